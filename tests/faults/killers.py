"""Encoders that kill their own process, imported by Ray workers."""

import os
import signal
from pathlib import Path

from pipeline.ingest import ingestion
from pipeline.ingest.passages import Splitter
from pipeline.stages import ingest
from pipeline.stages.embed import EncoderActor

POISON = "zygote"
POISONED_FILE = "poison.jsonl"


class DeadlySplitter(Splitter):
    """Dies of any document that has the word POISON in it."""

    def __call__(self, texts, known=None):
        if any(POISON in text for text in texts):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(texts, known)


def read_or_die(part, *arguments):
    """Dies of the file POISONED_FILE."""
    if part.uri.endswith(POISONED_FILE):
        os.kill(os.getpid(), signal.SIGKILL)
    return read_documents(part, *arguments)


read_documents = ingestion.read_documents


def make_deadly():
    """In a worker process: what splits and what reads kill it."""
    ingest._splitter.cache_clear()  # Ray's workers live from test to test
    ingest.Splitter = DeadlySplitter
    ingestion.read_documents = read_or_die


def ingest_row(row, *arguments):
    """Instead of the task that reads a unit."""
    make_deadly()
    return ingest._ingest_row(row, *arguments)


class DeadlyReader(ingest.UnitReader):
    """Instead of the process that reads a unit apart."""

    def __init__(self, *arguments):
        make_deadly()
        super().__init__(*arguments)


class KillsAtPoison(EncoderActor):
    """Dies whenever a text has the word POISON in it."""

    def _encode(self, encoder, unit):
        word = encoder.tokenizer([POISON])[0][1]
        if any(word in text for text in unit.tokens):
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._encode(encoder, unit)


class KillsOnce(EncoderActor):
    """Dies in its first unit, the first time that any does."""

    def _encode(self, encoder, unit):
        mark = Path(self._storage.uri).parent / "killed"
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._encode(encoder, unit)
