"""What can go wrong, told apart by what the user can do about it.

Every message is one line: ``<where>: <what is wrong>, <what was found>; <what to do>``.
A job prints it and exits with ``exit_code``; any other exception is a bug and keeps its traceback.
"""


class VecmillError(Exception):
    """Base of every error that is not a bug in vecmill."""

    exit_code = 1


class ConfigError(VecmillError):
    """The config or the command line is wrong: edit it."""

    exit_code = 2


class DataError(VecmillError):
    """The corpus breaks its contract: mend the data or raise the ceiling."""

    exit_code = 3


class LockedError(VecmillError):
    """Another writer holds the root: wait for it."""

    exit_code = 4


class VerificationError(VecmillError):
    """A file, an artifact or its recall is not what it must be: rebuild it."""

    exit_code = 5


class StorageError(VecmillError):
    """The storage did not do what was asked: check path, credentials, network."""


class EncoderError(VecmillError):
    """The model cannot be loaded or cannot give what the plan promised."""
