"""Chromium, driven by its own protocol over a pair of pipes. It trusts one more authority, as a user's browser may.

    pages of a test ◄── JSON, each message ended by a zero byte ──► chromium --remote-debugging-pipe

`Page.ask` runs JavaScript and waits for its promises. `Page.events` has what the browser tells of a page: of each
response its status, whether the connection was used before, and the certificate that it has verified.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from tests.support.peers import PATIENCE
from tests.support.programs import program, run

OPTIONS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--window-size=800,500",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-pipe",
]  # fmt: skip
READS, WRITES = 3, 4
"""The descriptors at which Chromium expects its pipes."""


class Page:
    """A tab."""

    def __init__(self, browser: Browser, session: str) -> None:
        self.events: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)  # by method: their parameters
        self._browser = browser
        self._session = session
        self._news = trio.Event()

    async def send(self, method: str, **arguments: Any) -> dict[str, Any]:
        """Call a method of the protocol."""
        return await self._browser.send(method, arguments, self._session)

    async def visit(self, url: str) -> None:
        """Open a page, and wait until all of it is loaded."""
        self.events.clear()
        done = await self.send("Page.navigate", url=url)
        assert "errorText" not in done, f"{url}: {done['errorText']}"
        await self.wait_for("Page.loadEventFired")

    async def wait_for(self, method: str, count: int = 1) -> None:
        """Wait until there were so many of such an event since the last visit."""
        with trio.fail_after(PATIENCE * 3):
            while len(self.events[method]) < count:
                await self._news.wait()

    async def ask(self, script: str) -> Any:
        """The value of an expression, once its promise is kept."""
        done = await self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    async def screenshot(self) -> bytes:
        """What a user sees, as PNG."""
        await self.send("Page.bringToFront")  # of a tab in the background there is none
        return base64.b64decode((await self.send("Page.captureScreenshot"))["data"])

    def on_event(self, event: dict[str, Any]) -> None:
        """Note what the browser tells."""
        self.events[event["method"]].append(event["params"])
        self._news.set()
        self._news = trio.Event()


class Browser:
    """A running Chromium."""

    def __init__(self, reads: trio.abc.ReceiveStream, writes: trio.abc.SendStream) -> None:
        self._reads, self._writes = reads, writes
        self._pages: dict[str, Page] = {}
        self._asked: dict[int, trio.MemorySendChannel[dict[str, Any]]] = {}
        self._sending = trio.Lock()
        self._count = 0

    async def open_page(self) -> Page:
        """A new tab."""
        target = (await self.send("Target.createTarget", {"url": "about:blank"}))["targetId"]
        session = (await self.send("Target.attachToTarget", {"targetId": target, "flatten": True}))["sessionId"]
        page = self._pages[session] = Page(self, session)
        for domain in ("Page", "Network"):
            await page.send(f"{domain}.enable")
        return page

    async def send(self, method: str, arguments: dict[str, Any], session: str = "") -> dict[str, Any]:
        """Call a method of the protocol, and wait for its result."""
        self._count += 1
        number, (answer, answers) = self._count, trio.open_memory_channel[dict[str, Any]](1)
        self._asked[number] = answer
        message = {"id": number, "method": method, "params": arguments} | ({"sessionId": session} if session else {})
        async with self._sending:
            await self._writes.send_all(json.dumps(message).encode() + b"\0")
        with trio.fail_after(PATIENCE * 3):  # a busy machine starts a browser in 10 s
            done = await answers.receive()
        assert "error" not in done, (method, done)
        result: dict[str, Any] = done["result"]
        return result

    async def listen(self) -> None:
        """Hand out results and events until Chromium ends."""
        pending = b""
        async for chunk in self._reads:
            *messages, pending = (pending + chunk).split(b"\0")
            for message in map(json.loads, messages):
                if "id" in message:
                    self._asked.pop(message["id"]).send_nowait(message)
                elif message.get("sessionId") in self._pages:
                    self._pages[message["sessionId"]].on_event(message)


@asynccontextmanager
async def browser(
    folder: Path, find: Callable[[str], str], names: str, roots: Path | None = None
) -> AsyncIterator[Browser]:
    """Run Chromium with a home in `folder`. It finds this machine under `names`, such as `*.t.example.org`, and trusts
    the authority of the file `roots`.
    """
    home = folder / "home"
    if roots is not None:
        store = home / ".pki" / "nssdb"
        store.mkdir(parents=True)
        certutil = [find("certutil"), "-d", f"sql:{store}"]
        await run([*certutil, "-N", "--empty-password"])
        await run([*certutil, "-A", "-t", "C,,", "-n", "the authority of a test", "-i", str(roots)])
    options = [*OPTIONS, f"--user-data-dir={home}/profile", f"--host-resolver-rules=MAP {names} 127.0.0.1"]
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    writes, reads = trio.lowlevel.FdStream(ours_out), trio.lowlevel.FdStream(ours_in)
    command = [
        find("bash"),
        "-c",
        f'exec "$0" "$@" {READS}<&{theirs_in} {WRITES}>&{theirs_out}',
        find("chromium"),
        *options,
    ]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": os.environ | {"HOME": str(home)}}
    async with (
        writes,
        reads,
        program(command, pass_fds=(theirs_in, theirs_out), **quiet) as process,
        trio.open_nursery() as nursery,
    ):
        os.close(theirs_in)
        os.close(theirs_out)
        running = Browser(reads, writes)
        nursery.start_soon(running.listen)
        yield running
        await running.send("Browser.close", {})
        with trio.move_on_after(PATIENCE):
            await process.wait()
        nursery.cancel_scope.cancel()
