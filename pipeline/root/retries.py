"""Retries of requests to S3, in one layer: throttling, server errors, broken connections and bodies; never a refusal.

botocore does not retry a body that breaks off and s3fs does not retry a 500 by itself, so botocore's own retries are switched
off and s3fs's, which wrap whole requests with their bodies, decide by what is said here. They wait 0.1 s, then 1.7 times as
long each time, at most 15 s: about two minutes in all.
"""

import asyncio
import threading
from typing import Any

ATTEMPTS = 16
THROTTLING = ("SlowDown", "Throttling", "RequestLimitExceeded", "reduce your request rate", "TooManyRequests")
SERVER_ERROR = 500
TOO_MANY = 429
BROKEN = (
    "ClientPayloadError", "ServerDisconnectedError", "ServerTimeoutError", "ClientOSError", "ClientConnectorError",
    "ConnectionClosedError", "EndpointConnectionError", "ConnectTimeoutError", "ReadTimeoutError", "ResponseStreamingError",
    "IncompleteReadError", "HTTPClientError", "ConnectionError", "ChecksumError", "FlexibleChecksumError",
)  # fmt: skip
"""Names of exceptions (or of one they inherit from) of a connection or body that broke."""

_lock = threading.Lock()
_count = 0


def add(number: int) -> None:
    """Count retries, those of another process too."""
    global _count  # noqa: PLW0603 - one number per process, as the handler is
    with _lock:
        _count += number


def so_far() -> int:
    """Retries counted since they were last taken."""
    return _count


def taken() -> int:
    """Retries counted since this was last called."""
    global _count
    with _lock:
        number, _count = _count, 0
    return number


def install() -> dict[str, Any]:
    """Have s3fs ask ``_should_retry``; returns the options of a file system that leave botocore's own retries off."""
    import s3fs.core

    s3fs.core.S3_RETRYABLE_ERRORS = ()
    s3fs.core.set_custom_error_handler(_should_retry)
    s3fs.core.S3FileSystem.retries = ATTEMPTS
    return {"config_kwargs": {"retries": {"total_max_attempts": 1}}}


def _should_retry(error: BaseException) -> bool:
    again = is_passing(error)
    add(again)
    return again


def is_passing(error: BaseException) -> bool:
    """Whether the same request may work a moment later."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return status >= SERVER_ERROR or status == TOO_MANY or any(sign in str(error) for sign in THROTTLING)
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & set(BROKEN)) or isinstance(error, TimeoutError | asyncio.IncompleteReadError)
