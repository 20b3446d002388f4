"""A headless Chromium, driven over its DevTools protocol: pages are really opened, clicked and typed into."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import aiohttp

WITHIN_S = 30.0  # a bound for two busy cores; nothing takes a second
LISTENING = re.compile(r"DevTools listening on (ws://\S+)")
FLAGS = (
    "--headless=new",
    "--remote-debugging-port=0",
    "--no-sandbox",  # it is given nothing but our own page, and root has no other way
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--window-size=1100,900",
)
# Resolves as soon as the expression holds; the page's own changes wake it.
UNTIL = """new Promise((resolve) => {
  const look = () => { if (%s) { watch.disconnect(); resolve(true); return true; } return false; };
  const watch = new MutationObserver(look);
  if (!look()) watch.observe(document, { subtree: true, childList: true, attributes: true, characterData: true });
})"""


@contextmanager
def chromium() -> Iterator[str]:
    """Run a browser with a profile of its own; yield the address of its DevTools."""
    program = shutil.which("chromium")
    assert program is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [program, *FLAGS, f"--user-data-dir={profile}"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
            assert process.stderr is not None
            try:
                found = next(filter(None, map(LISTENING.search, process.stderr)))
                yield found[1]
            finally:
                process.terminate()
                process.stderr.read()  # until the last of its processes has let go of the pipe


class Page:
    """One tab. ``complaints`` are the console's errors, uncaught exceptions and refused loads so far."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self._session = ""
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self.complaints: list[str] = []

    async def open_tab(self) -> None:
        """Make the tab, with storage of its own."""
        context = (await self.send("Target.createBrowserContext"))["browserContextId"]
        target = await self.send("Target.createTarget", url="about:blank", browserContextId=context)
        attached = await self.send("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            await self.send(f"{domain}.enable")

    async def listen(self) -> None:
        """Take what the browser says, until it hangs up."""
        async for message in self._socket:
            said = json.loads(message.data)
            if "id" in said:
                self._answers.pop(said["id"]).set_result(said)
            elif said["method"] == "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(said["params"]["exceptionDetails"]))
            elif said["method"] == "Log.entryAdded" and said["params"]["entry"]["level"] == "error":
                self.complaints.append(said["params"]["entry"]["text"])
            elif said["method"] == "Runtime.consoleAPICalled" and said["params"]["type"] in ("error", "assert"):
                self.complaints.append(json.dumps(said["params"]["args"]))

    async def send(self, method: str, **params: object) -> dict[str, Any]:
        """Carry out a command of the protocol and return its result."""
        number = next(self._numbers)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        session = {"sessionId": self._session} if self._session else {}
        await self._socket.send_json({"id": number, "method": method, "params": params, **session})
        async with asyncio.timeout(WITHIN_S):
            said = await answer
        assert "error" not in said, said
        return dict(said["result"])

    async def open(self, url: str) -> None:
        """Go there, and return once the page has drawn something."""
        await self.send("Page.navigate", url=url)
        await self.until("!['connecting', undefined].includes(document.querySelector('#overall')?.textContent)")

    async def value(self, expression: str) -> Any:
        """Return what the expression, or the promise that it is, comes to."""
        said = await self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in said, said
        return said["result"].get("value")

    async def until(self, expression: str) -> None:
        """Return as soon as the expression holds."""
        assert await self.value(UNTIL % expression)

    async def text(self, selector: str) -> str:
        """Return what a reader sees there."""
        return str(await self.value(f"document.querySelector({json.dumps(selector)}).innerText"))

    async def click(self, selector: str) -> None:
        """Press the mouse on the middle of an element."""
        box = f"document.querySelector({json.dumps(selector)}).getBoundingClientRect()"
        x, y = await self.value(f"[{box}.x + {box}.width / 2, {box}.y + {box}.height / 2]")
        for kind in ("mousePressed", "mouseReleased"):
            await self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    async def type(self, text: str) -> None:
        """Write into what has the focus."""
        await self.send("Input.insertText", text=text)

    async def show_as(self, *, width: int = 1100, scheme: str = "light") -> None:
        """Show the page on a screen of this width, in this colour scheme."""
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        await self.send("Emulation.setDeviceMetricsOverride", **metrics)
        await self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    async def picture(self) -> bytes:
        """Return a picture (PNG) of the whole page, for a person to look at."""
        taken = await self.send("Page.captureScreenshot", captureBeyondViewport=True)
        return base64.b64decode(taken["data"])


@asynccontextmanager
async def tab(devtools: str) -> AsyncIterator[Page]:
    """Yield a new tab of this browser."""
    async with aiohttp.ClientSession() as session, session.ws_connect(devtools, max_msg_size=0) as socket:
        page = Page(socket)
        listening = asyncio.create_task(page.listen())
        try:
            await page.open_tab()
            yield page
        finally:
            listening.cancel()
