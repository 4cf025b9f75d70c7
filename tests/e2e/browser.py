"""A page in a real browser: headless Chromium, asked over its own protocol."""

import asyncio
import base64
import contextlib
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = shutil.which("chromium")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--remote-debugging-port=0",
)  # fmt: skip
FACTS = """(() => {
  const box = each => each.getBoundingClientRect(), css = each => getComputedStyle(each);
  const all = query => [...document.querySelectorAll(query)];
  const letters = [
    ...all("svg text").map(each => box(each).height),
    ...all("p, td, th, b, h1, h2, summary").map(each => parseFloat(css(each).fontSize)),
  ];
  const cut = all("main *").filter(each => !each.ownerSVGElement && box(each).right > innerWidth + 1);
  return {
    width: document.documentElement.scrollWidth,
    plots: all("svg").map(each => box(each).height),
    shapes: all("svg path").length,
    smallest: Math.min(...letters),
    cut: cut.map(each => each.outerHTML.slice(0, 200)),
    colours: [css(document.body).color, css(document.body).backgroundColor],
  };
})()"""
KEYS = {
    "Enter": ("Enter", 13, "\r"), "Escape": ("Escape", 27, ""), "Tab": ("Tab", 9, ""), " ": ("Space", 32, " "),
    "ArrowLeft": ("ArrowLeft", 37, ""), "ArrowUp": ("ArrowUp", 38, ""), "ArrowRight": ("ArrowRight", 39, ""),
    "ArrowDown": ("ArrowDown", 40, ""), "/": ("Slash", 191, "/"),
}  # fmt: skip
"""Keys that are no letters: code, number, text."""
TOLD = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")


class Tab:
    """A tab of a browser. ``errors``: what its console told; ``requests``: what it has asked for, method, address and body."""

    def __init__(self, runner: asyncio.Runner, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.errors: list[str] = []
        self.requests: list[tuple[str, str, str | None]] = []
        self._runner = runner
        self._socket = socket
        self._session: str | None = None
        self._numbers = iter(range(1, 1_000_000))
        self._events: list[str] = []

    def open(self, *, width: int, height: int, dark: bool) -> None:
        """Make the tab a window of a size, in light or dark."""
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Log", "Runtime", "Page", "Network"):
            self.ask(f"{domain}.enable")
        self.ask("Emulation.setFocusEmulationEnabled", enabled=True)
        self.resize(width, height)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])

    def resize(self, width: int, height: int) -> None:
        """Another size of the window, in pixels."""
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)

    def visit(self, uri: str) -> None:
        """Go to a page and wait until it is loaded; to another place of the same page there is nothing to load."""
        self._events.clear()
        if "loaderId" in self.ask("Page.navigate", url=uri):
            self._runner.run(self._until_loaded())

    def value(self, expression: str) -> Any:
        """What a JavaScript expression is on the page."""
        answer = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, f"{expression}: {answer['exceptionDetails']}"
        return answer["result"].get("value")

    def wait(self, expression: str) -> None:
        """Wait until an expression is true."""
        deadline = time.monotonic() + 30
        while not self.value(f"Boolean({expression})"):
            assert time.monotonic() < deadline, f"never true: {expression}; {self.value('document.body.innerText')}"
            time.sleep(0.02)

    def press(self, *keys: str) -> None:
        """Press keys one after the other, by their names or letters."""
        for key in keys:
            code, number, text = KEYS.get(key) or (f"Key{key.upper()}", ord(key.upper()), key)
            what = {"key": key, "code": code, "windowsVirtualKeyCode": number}
            self.ask("Input.dispatchKeyEvent", type="keyDown", **what, **({"text": text} if text else {}))
            self.ask("Input.dispatchKeyEvent", type="keyUp", **what)

    def write(self, text: str) -> None:
        """Put a text where the cursor is."""
        self.ask("Input.insertText", text=text)

    def click(self, query: str) -> None:
        """Click into the middle of the first element of a CSS query."""
        box = self.value(
            f"(e => {{ e.scrollIntoView({{block: 'center'}}); const b = e.getBoundingClientRect();"
            f" return [b.x + b.width / 2, b.y + b.height / 2]; }})(document.querySelector({json.dumps(query)}))"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.ask("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def picture(self, file: Path) -> None:
        """A screenshot of the whole page, PNG."""
        found = self.ask("Page.captureScreenshot", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(found["data"]))

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command of the DevTools protocol and its result."""
        return self._runner.run(self._ask(method, parameters))

    async def _ask(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        number = next(self._numbers)
        to = {"sessionId": self._session} if self._session else {}
        await self._socket.send_json({"id": number, "method": method, "params": parameters, **to})
        while (message := await self._receive()).get("id") != number:
            pass
        assert "error" not in message, message
        result: dict[str, Any] = message["result"]
        return result

    async def _until_loaded(self) -> None:
        while "Page.loadEventFired" not in self._events:
            await self._receive()

    async def _receive(self) -> dict[str, Any]:
        message: dict[str, Any] = await self._socket.receive_json(timeout=60)
        method = message.get("method", "")
        self._events.append(method)
        if method in TOLD:
            self.errors.append(str(message["params"]))
        elif method == "Network.requestWillBeSent":
            request = message["params"]["request"]
            self.requests.append((request["method"], request["url"], request.get("postData")))
        return message


@contextlib.contextmanager
def tab(folder: Path, *, width: int = 1400, height: int = 900, dark: bool = False) -> Iterator[Tab]:
    """A tab of a browser of its own, whose profile lies in ``folder``."""
    profile = folder / f"profile-{width}-{dark}"
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with asyncio.Runner() as runner:
            session = runner.run(_session())
            try:
                made = Tab(runner, runner.run(_connected(session, _socket(profile, process))))
                made.open(width=width, height=height, dark=dark)
                yield made
            finally:
                runner.run(session.close())
    finally:
        process.terminate()
        process.wait()


def look_at(page: Path, folder: Path, *, width: int, dark: bool = False) -> dict[str, Any]:
    """What a browser window of a width makes of a local page: FACTS, ``errors`` of its console, a screenshot in ``folder``."""
    with tab(folder, width=width, dark=dark) as opened:
        opened.visit(page.absolute().as_uri())
        facts = opened.value(FACTS)
        opened.picture(folder / f"{width}{'-dark' if dark else ''}.png")
        return {**facts, "errors": opened.errors}


async def _session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession()


async def _connected(session: aiohttp.ClientSession, socket: str) -> aiohttp.ClientWebSocketResponse:
    return await session.ws_connect(socket, max_msg_size=0)


def _socket(profile: Path, process: "subprocess.Popen[bytes]") -> str:
    file = profile / "DevToolsActivePort"
    for _ in range(600):
        assert process.poll() is None, f"chromium ended with {process.returncode}"
        with contextlib.suppress(FileNotFoundError, ValueError):
            port, path = file.read_text().split()
            return f"ws://127.0.0.1:{port}{path}"
        time.sleep(0.1)
    raise TimeoutError("chromium opened no port")
