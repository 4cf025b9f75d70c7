"""Retries of requests to S3, in one layer: throttling, server errors, broken connections and bodies; never a refusal.

botocore does not retry a body that breaks off and s3fs does not retry a 500 by itself, so botocore's own retries are switched
off and the one function of s3fs that wraps whole requests, with their bodies, is the one here. It waits 0.1 s, then 1.7 times
as long each time, at most 15 s: about two minutes in all.
"""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from pipeline.errors import ConfigError

ATTEMPTS = 16
FIRST_WAIT_S, GROWTH, LONGEST_WAIT_S = 0.1, 1.7, 15.0
PASSING = (
    "SlowDown", "Throttling", "RequestLimitExceeded", "reduce your request rate", "TooManyRequests",
    "RequestTimeout", "XAmzContentSHA256Mismatch", "ConditionalRequestConflict", "OperationAborted",
)  # fmt: skip
"""In what a server says of a request that it may take a moment later, or that reached it broken."""
GIVEN_UP = "not tried again"
SERVER_ERROR = 500
TOO_MANY = 429
BROKEN = (
    "ClientPayloadError", "ServerDisconnectedError", "ServerTimeoutError", "ClientOSError", "ClientConnectorError",
    "ConnectionClosedError", "EndpointConnectionError", "ConnectTimeoutError", "ReadTimeoutError", "ResponseStreamingError",
    "IncompleteReadError", "HTTPClientError", "ConnectionError", "ChecksumError", "FlexibleChecksumError",
    "ResponseParserError",
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
    """Have s3fs send every request by ``_insist``; returns options of a file system that leave botocore's own retries off.

    Raises ConfigError for an s3fs that sends them in another way.
    """
    import s3fs.core

    if not hasattr(s3fs.core, "_error_wrapper"):
        raise ConfigError(f"s3fs {s3fs.__version__}: sends requests in a way that is not known here; install s3fs 2026.9")
    s3fs.core._error_wrapper = _insist  # its own counts nothing, and asks nobody about some errors
    s3fs.core.S3FileSystem.retries = ATTEMPTS
    return {"config_kwargs": {"retries": {"total_max_attempts": 1}}}


async def _insist(
    request: Callable[..., Awaitable[Any]], *, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, retries: int
) -> Any:
    """What a request gives, made again while ``is_passing`` says so; its last error as an OSError where s3fs has one for it.

    s3fs wraps a request with its body once more than the request: what the inner one has given up, the outer one does too.
    """
    from s3fs.errors import translate_boto_error

    for attempt in range(1, retries + 1):
        try:
            return await request(*args, **(kwargs or {}))
        except Exception as error:  # noqa: BLE001 - is_passing decides
            if attempt == retries or GIVEN_UP in getattr(error, "__notes__", ()) or not is_passing(error):
                last: Exception = translate_boto_error(error)
                last.add_note(GIVEN_UP)
                raise last from last.__cause__
        add(1)
        await asyncio.sleep(min(FIRST_WAIT_S * GROWTH ** (attempt - 1), LONGEST_WAIT_S))
    return None


def is_passing(error: BaseException) -> bool:
    """Whether the same request may work a moment later."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return status >= SERVER_ERROR or status == TOO_MANY or any(sign in str(error) for sign in PASSING)
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & set(BROKEN)) or isinstance(error, TimeoutError | asyncio.IncompleteReadError)
