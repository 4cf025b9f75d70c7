"""What can go wrong, told apart by what the user can do about it.

Every message is one line: ``<where>: <what is wrong>, <what was found>; <what to do>``.
A job prints it and exits with ``exit_code``; any other exception is a bug and keeps its traceback.
"""

import re


class VecmillError(Exception):
    """Base of every error that is not a bug in vecmill."""

    exit_code = 1


class ConfigError(VecmillError):
    """The config or the command line is wrong: edit it."""

    exit_code = 2


class DataError(VecmillError):
    """The corpus breaks its contract: mend the data or raise the ceiling."""

    exit_code = 3


class BadFileError(DataError):
    """An input file cannot be read as what it is. Its text, one argument as Ray passes it on: ``<uri>: <code>, <what>``."""

    @property
    def code(self) -> str:
        """For machines: E_NOT_PARQUET and so on."""
        found = re.search(r": (E_[A-Z0-9_]+), ", str(self))
        return found.group(1) if found else ""


class LockedError(VecmillError):
    """Another writer holds the root: wait for it."""

    exit_code = 4


class VerificationError(VecmillError):
    """A file, an artifact or its recall is not what it must be: rebuild it."""

    exit_code = 5


class StorageError(VecmillError):
    """The storage did not do what was asked: check path, credentials, network."""


class ProcessError(VecmillError):
    """Processes of the run died, and starting them again did not help: look at memory, then run again."""


class EncoderError(VecmillError):
    """The model cannot be loaded or cannot give what the plan promised."""
