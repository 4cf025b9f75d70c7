"""vecmill: a corpus of text becomes one servable vector index.

Importing this package imports nothing heavy. Read ``run.py`` first, then any one stage.
"""

__version__ = "0.1.0"
