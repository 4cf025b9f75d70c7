"""vecmill: a corpus of text becomes one servable vector index.

Importing this package imports nothing heavy. Read ``run.py`` first, then any one room.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.client import Artifact

__version__ = "0.1.0"


def open_artifact(uri: str) -> "Artifact":
    """Open an artifact folder at any fsspec URI, to ask it: ``open_artifact(uri).search("a text", k=10)``."""
    from pipeline import client

    return client.open_artifact(uri)
