"""An HTTP proxy before an object store that breaks some of the requests, kind after kind in turn."""

import asyncio
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import aiohttp
from aiohttp import web
from yarl import URL

HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "expect"}
SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
KINDS = ("reset", "slow down", "server error", "truncated", "lost reply")


class FaultProxy:
    """``share`` of the requests end in one of ``kinds``; ``broken`` counts them, ``methods`` all of them by method.

    Every kind comes before any comes again, so that a few dozen faults meet them all whatever order requests arrive in.
    """

    def __init__(self, target: str, share: float, kinds: Sequence[str] = KINDS) -> None:
        self.endpoint = ""
        self.share, self.kinds = share, kinds
        self._owed = 0.0  # faults, by the share of the requests so far
        self.methods: Counter[str] = Counter()
        self.broken: Counter[str] = Counter()
        self._target = target
        self._session: aiohttp.ClientSession | None = None

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.methods[request.method] += 1
        body = await request.read()
        fault = self._fault(request.method)
        if fault == "reset":
            return _cut(request)
        if fault == "slow down":
            return web.Response(status=503, body=SLOW_DOWN, content_type="application/xml")
        if fault == "server error":
            return web.Response(status=500, body=SLOW_DOWN.replace(b"SlowDown", b"InternalError"))
        headers = {name: value for name, value in request.headers.items() if name.lower() not in HOP_BY_HOP}
        url = URL(self._target + request.raw_path, encoded=True)
        options = {"skip_auto_headers": ("Content-Type", "User-Agent", "Accept-Encoding"), "allow_redirects": False}
        async with self._session.request(request.method, url, headers=headers, data=body, **options) as found:
            data = await found.read()
        if fault == "lost reply":
            return _cut(request)
        headers = {name: value for name, value in found.headers.items() if name.lower() not in HOP_BY_HOP}
        length = found.headers.get("Content-Length", str(len(data)))
        answer = web.StreamResponse(status=found.status, headers=headers | {"Content-Length": length})
        await answer.prepare(request)
        if request.method != "HEAD":
            await answer.write(data[: len(data) // 2] if fault == "truncated" else data)
        if fault == "truncated":
            return _cut(request)
        await answer.write_eof()
        return answer

    def _fault(self, method: str) -> str | None:
        self._owed = min(self._owed + self.share, 1.0)
        fault = min(self.kinds, key=lambda kind: self.broken[kind])
        if self._owed < 1.0 or (fault == "truncated" and method != "GET"):  # it waits for a request with a body to break off
            return None
        self._owed = 0.0
        self.broken[fault] += 1
        return fault

    async def serve(self, ready: threading.Event, stop: asyncio.Event) -> None:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", self._handle)
        runner = web.AppRunner(app, access_log=None, auto_decompress=False)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.endpoint = f"http://127.0.0.1:{runner.addresses[0][1]}"
        async with aiohttp.ClientSession(auto_decompress=False) as self._session:
            ready.set()
            await stop.wait()
        await runner.cleanup()


def _cut(request: web.Request) -> web.Response:
    """Close the connection without another byte."""
    if request.transport is not None:
        request.transport.abort()
    return web.Response()


@contextmanager
def faults_before(target: str, share: float, **options: object) -> Iterator[FaultProxy]:
    """A proxy before ``target`` for the length of a block."""
    proxy, ready = FaultProxy(target, share, **options), threading.Event()
    loop, stop = asyncio.new_event_loop(), asyncio.Event()
    thread = threading.Thread(target=lambda: loop.run_until_complete(proxy.serve(ready, stop)), daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield proxy
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
