"""Encoders that kill their own process, imported by Ray workers."""

import os
import signal
from pathlib import Path

from pipeline.stages.embed import EncoderActor

POISON = "zygote"


def ingest_and_die(*_arguments, **_options):
    """Instead of the reading of a unit."""
    os.kill(os.getpid(), signal.SIGKILL)


class KillsAtPoison(EncoderActor):
    """Dies whenever a text has the word POISON in it."""

    def _encode(self, encoder, tokens, draft):
        word = encoder.tokenizer([POISON])[0][1]
        if any(word in text for text in tokens):
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._encode(encoder, tokens, draft)


class KillsOnce(EncoderActor):
    """Dies in its first unit, the first time that any does."""

    def _encode(self, encoder, tokens, draft):
        mark = Path(self._storage.uri).parent / "killed"
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._encode(encoder, tokens, draft)
