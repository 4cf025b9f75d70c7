"""The only Ray door: where work runs, never what it computes."""
