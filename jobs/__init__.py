"""The command line: thin entry points, one module per command; ``vecmill <command>`` is ``python -m jobs <command>``."""
