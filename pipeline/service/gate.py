"""What every request passes, around the app: its name, the token, the body's size, kind and time, the count of answers."""

import asyncio
import hashlib
import hmac
import logging
import random
import re
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.config import ServeConfig
from pipeline.metrics import SEARCH_REQUESTS
from pipeline.operations.exposition import Meters
from pipeline.service.refusals import RefusedError

OPEN = ("/", "/healthz", "/readyz")
"""Probes and browsers know no token, and these tell nothing of the corpus."""
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
OTHER = "other"
"""The route of a request for none of ours: paths of strangers are no label."""

_log = logging.getLogger(__name__)


def digest_of(token: str | None) -> bytes | None:
    """What of a token is kept and sent to replicas: not the token itself."""
    return hashlib.sha256(token.encode()).digest() if token else None


class Gate:
    """Wraps an ASGI app. ``token``: SHA-256 of what ``Authorization: Bearer`` must hold, None for nothing."""

    def __init__(self, app: ASGIApp, limits: ServeConfig, meters: Meters, token: bytes | None) -> None:
        self._app = app
        self._limits = limits
        self._meters = meters
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request; what goes wrong before its answer began becomes an envelope."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, status = Headers(scope=scope), 0
        given = headers.get("x-request-id", "")
        name = given if REQUEST_ID.fullmatch(given) else f"{random.getrandbits(128):032x}"

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = name
            await send(message)

        try:
            self._check_token(scope["path"], headers)
            body = await self._body(scope["method"], headers, receive)
            await self._app(scope, _replay(body, receive), named)
        except RefusedError as error:
            await error.response()(scope, receive, named)
        except Exception:  # noqa: BLE001 - a bug: the app has answered 500, here it is told
            _log.exception("request %s failed", name)
        finally:
            route = getattr(scope.get("route"), "path", OTHER)
            self._meters.count(SEARCH_REQUESTS, route=route, code=str(status))

    def _check_token(self, path: str, headers: Headers) -> None:
        if self._token is None or path in OPEN:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(digest_of(given.strip()) or b"", self._token):
            raise RefusedError(401, "invalid_token", "the token is missing or wrong; send Authorization: Bearer <token>")

    async def _body(self, method: str, headers: Headers, receive: Receive) -> bytes:
        """The whole body, within the limits."""
        if method != "POST":
            return b""
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise RefusedError(415, "not_json", "the body must be of Content-Type: application/json")
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise RefusedError(415, "encoded_body", "the body must not be compressed")
        too_long = RefusedError(413, "too_long", f"the body is over the limit, {int(self._limits.max_body)} bytes; send less")
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._limits.max_body:
            raise too_long
        body = bytearray()
        try:
            async with asyncio.timeout(self._limits.timeout_s):
                while True:
                    message = await receive()
                    body += message.get("body", b"")
                    if len(body) > self._limits.max_body:
                        raise too_long
                    if not message.get("more_body"):
                        return bytes(body)
        except TimeoutError as error:
            raise RefusedError(408, "slow_body", f"the body took over {self._limits.timeout_s:g} s; send it faster") from error


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body in one message, then what else comes."""
    todo = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Any:
        return todo.pop() if todo else await receive()

    return replayed
