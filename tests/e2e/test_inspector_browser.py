"""Chromium shows the page of an inspector: what arrives, live, and a replay with edits.

browser ──► page of the agent ◄── copies ── agent ──► local server
visitor ──► relay ───────────────────────►  agent
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from tests.e2e.test_web import application
from tests.support.browser import Page, browser
from tests.support.peers import PATIENCE, read_all
from tests.support.programs import daemon, program, tunnel_command
from tunneld.net.endpoint import Endpoint

Find = Callable[[str], str]
WAIT = "new Promise(kept => { const look = () => { if (%s) kept(); else setTimeout(look, 10) }; look() })"
HOSTILE = b"GET /<img%20src=x%20onerror=document.title=1>?token=t HTTP/1.1\r\nHost: blog\r\nConnection: close\r\n\r\n"
PICTURE = b"GET /picture/1.svg HTTP/1.1\r\nHost: blog\r\nConnection: close\r\n\r\n"


@asynccontextmanager
async def inspected(folder: Path, find: Find) -> AsyncIterator[tuple[Endpoint, Page]]:
    """A relay, an agent with an inspector, and its page in a browser; yields the public address, too."""
    find("chromium")  # before the others start
    async with (
        application("home") as port,
        daemon(folder) as relay,
        browser(folder, find, "*.nowhere.example") as running,
    ):
        command = tunnel_command(
            "expose", str(port), "--inspect", "127.0.0.1:0", "--relay", f"127.0.0.1:{relay.control_port}"
        )
        async with program(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as agent:
            assert agent.stdout is not None
            assert agent.stderr is not None
            said = b""
            with trio.fail_after(PATIENCE):
                address = Endpoint.parse((await agent.stdout.receive_some()).decode().strip())
                while b"token=" not in said or not said.endswith(b"\n"):
                    said += await agent.stderr.receive_some()
            found = re.search(r"http://127\.0\.0\.1:[0-9]+/\?token=\S+", said.decode())
            assert found is not None
            page = await running.open_page()
            await page.visit(found[0])
            await page.wait_for("Page.loadEventFired", 2)  # it goes on to the page by itself
            yield address, page


async def visit(address: Endpoint, request: bytes) -> None:
    async with await trio.open_tcp_stream(address.host, address.port) as stream:
        await stream.send_all(request)
        assert (await read_all(stream)).startswith(b"HTTP/1.1 ")


async def until(page: Page, condition: str) -> None:
    """Wait until an expression is true in the page."""
    with trio.fail_after(PATIENCE):
        await page.ask(WAIT % condition)


async def press(page: Page, key: str) -> None:
    await page.send("Input.dispatchKeyEvent", type="keyDown", key=key, text=key if len(key) == 1 else "")
    await page.send("Input.dispatchKeyEvent", type="keyUp", key=key)


async def test_a_request_in_the_browser(tmp_path: Path, program_path: Find) -> None:
    async with inspected(tmp_path, program_path) as (address, page):
        await until(page, "document.querySelector('#link.live')")
        assert await page.ask("location.pathname + location.search") == "/inspect/"
        assert await page.ask("document.cookie") == ""
        await visit(address, HOSTILE)
        await until(page, "document.querySelectorAll('#list .row').length == 1")
        await press(page, "j")
        await until(page, "document.querySelector('.title .target')")
        target = await page.ask("document.querySelector('.title .target').textContent")
        assert target == "/<img%20src=x%20onerror=document.title=1>?token=[redacted]"
        assert await page.ask("document.querySelectorAll('#list img, .title img').length") == 0
        await press(page, "e")
        await until(page, "document.getElementById('editor').open")
        await page.ask("document.getElementById('edit-target').value = '/edited'")
        await page.ask("document.getElementById('edit-send').click()")
        await until(page, "document.querySelector('.title .target').textContent == '/edited'")
        await until(page, "document.querySelectorAll('#list .tag.replay').length == 1")
        await press(page, "/")
        await page.send("Input.insertText", text="-is:replay")
        await until(page, "document.querySelectorAll('#list .row').length == 1")
        await visit(address, PICTURE)
        await until(page, "document.querySelectorAll('#list .row').length == 2")
        await page.ask("location.hash = document.querySelector('#list .row').id.slice(4)")
        await until(page, "document.querySelector('.body img')?.naturalWidth")  # the policy of the page permits it
        await page.send("Emulation.setDeviceMetricsOverride", width=360, height=640, deviceScaleFactor=1, mobile=True)
        await until(page, "innerWidth == 360")
        assert await page.ask("document.documentElement.scrollWidth") == 360
        assert await page.ask("getComputedStyle(document.querySelector('.list-pane')).display") == "none"
        assert await page.ask("document.title") == "Inspector"
        (tmp_path / "inspector.png").write_bytes(await page.screenshot())
