"""A page in a real browser: headless Chromium, asked over its own protocol."""

import asyncio
import base64
import contextlib
import shutil
import subprocess
import time
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


def look_at(page: Path, folder: Path, *, width: int, dark: bool = False) -> dict[str, Any]:
    """What a browser window of a width makes of a local page: FACTS, ``errors`` of its console, a screenshot in ``folder``."""
    profile = folder / f"profile-{width}-{dark}"
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        found = asyncio.run(_look(_socket(profile, process), page.absolute().as_uri(), width, dark))
    finally:
        process.terminate()
        process.wait()
    (folder / f"{width}{'-dark' if dark else ''}.png").write_bytes(base64.b64decode(found.pop("screenshot")))
    return found


def _socket(profile: Path, process: "subprocess.Popen[bytes]") -> str:
    file = profile / "DevToolsActivePort"
    for _ in range(600):
        assert process.poll() is None, f"chromium ended with {process.returncode}"
        with contextlib.suppress(FileNotFoundError, ValueError):
            port, path = file.read_text().split()
            return f"ws://127.0.0.1:{port}{path}"
        time.sleep(0.1)
    raise TimeoutError("chromium opened no port")


async def _look(socket: str, uri: str, width: int, dark: bool) -> dict[str, Any]:
    async with aiohttp.ClientSession() as session, session.ws_connect(socket, max_msg_size=0) as ws:
        errors: list[str] = []
        numbers = iter(range(1, 1000))

        async def receive() -> dict[str, Any]:
            message: dict[str, Any] = await ws.receive_json(timeout=60)
            if message.get("method") in {"Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled"}:
                errors.append(str(message["params"]))
            return message

        async def ask(method: str, session_id: str | None = None, **parameters: Any) -> dict[str, Any]:
            number = next(numbers)
            to = {"sessionId": session_id} if session_id else {}
            await ws.send_json({"id": number, "method": method, "params": parameters, **to})
            while (message := await receive()).get("id") != number:
                pass
            assert "error" not in message, message
            result: dict[str, Any] = message["result"]
            return result

        target = (await ask("Target.createTarget", url="about:blank"))["targetId"]
        tab = (await ask("Target.attachToTarget", targetId=target, flatten=True))["sessionId"]
        for domain in ("Log", "Runtime", "Page"):
            await ask(f"{domain}.enable", tab)
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        await ask("Emulation.setDeviceMetricsOverride", tab, **metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await ask("Emulation.setEmulatedMedia", tab, features=[scheme])
        await ask("Page.navigate", tab, url=uri)
        while (await receive()).get("method") != "Page.loadEventFired":
            pass
        facts = (await ask("Runtime.evaluate", tab, expression=FACTS, returnByValue=True))["result"]["value"]
        picture = await ask("Page.captureScreenshot", tab, captureBeyondViewport=True)
        return {**facts, "errors": errors, "screenshot": picture["data"]}
