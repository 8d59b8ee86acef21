"""Chromium shows the page: a user finds a noisy visitor and stops it, by mouse and by keyboard, on a phone, too."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.http.page.support import Tab
from tests.http.support import HttpRelay, running_http
from tests.support.browser import Page, browser
from tests.support.credentials import SECRET, authenticator_of, credential
from tests.support.peers import connect
from tunneld.net.endpoint import Endpoint, format_peer

Find = Callable[[str], str]
ALICE, ROOT = credential("alice"), credential("root", role="admin")
WAIT = "new Promise(kept => { const look = () => { if (%s) kept(); else setTimeout(look, 10) }; look() })"
LOG_IN = """
find = id => document.getElementById(id)
find('name').value = '%s'; find('secret').value = '%s'; find('form').requestSubmit()
"""
KEYS = {"Enter": "\r", "Tab": "", "Escape": ""}


@asynccontextmanager
async def shown(folder: Path, find: Find) -> AsyncIterator[tuple[HttpRelay, Page]]:
    """A relay, and a tab with its form to log in."""
    find("chromium")  # before the relay starts
    async with (
        running_http(authenticator=authenticator_of(ALICE, ROOT), page={"interval": 0.1}) as relay,
        browser(folder, find, "*.nowhere.example") as running,
    ):
        page = await running.open_page()
        await page.visit(f"http://{relay.authority}/")
        yield relay, page


async def log_in(page: Page, name: str) -> None:
    await page.ask(LOG_IN % (name, SECRET))
    await page.wait_for("Page.loadEventFired", 2)
    await until(page, "document.getElementById('link').dataset.state === 'live'")


async def until(page: Page, condition: str) -> None:
    await page.ask(WAIT % condition)


async def press(page: Page, *keys: str) -> None:
    for key in keys:
        text = KEYS.get(key, key)
        await page.send("Input.dispatchKeyEvent", type="keyDown", key=key, code=key, text=text, **code_of(key))
        await page.send("Input.dispatchKeyEvent", type="keyUp", key=key, code=key, **code_of(key))


def code_of(key: str) -> dict[str, Any]:
    number = {"Enter": 13, "Tab": 9, "Escape": 27}.get(key, 0)
    return {"windowsVirtualKeyCode": number} if number else {}


async def opened(relay: HttpRelay, user: str, name: str) -> dict[str, Any]:
    """A persistent tunnel of a user, as `show` describes it."""
    tab = Tab(relay)
    await tab.log_in(user)
    options = {"persist": "yes", "name": name}
    answer = await tab.post("/api/v1/openTunnel", {"args": ["tcp", "described"], "options": options})
    found: dict[str, Any] = (await tab.verb("show", answer.json["items"][0]["id"])).json["items"][0]
    return found


@asynccontextmanager
async def visited(tunnel: dict[str, Any]) -> AsyncIterator[trio.SocketStream]:
    """A visitor that is being served."""
    server, client = Endpoint.parse(tunnel["server"]), Endpoint.parse(tunnel["client"])
    async with await connect(server) as hidden, await connect(client) as visitor:
        await hidden.send_all(b"hello")
        assert await visitor.receive_some(5) == b"hello"
        yield visitor


async def test_a_visitor_is_found_and_kicked_with_the_keyboard_alone(tmp_path: Path, program_path: Find) -> None:
    async with shown(tmp_path, program_path) as (relay, page):
        tunnel = await opened(relay, "alice", "blog")
        async with visited(tunnel) as visitor:
            await log_in(page, "root")
            await until(page, "document.querySelector('td.name')?.textContent === 'blog'")
            await press(page, "j", "Enter")  # the first tunnel
            await until(page, "[...document.querySelectorAll('td button')].some(one => one.textContent === 'Kick')")
            await press(page, "j", "Enter")  # Kick, and then the dialog
            await until(page, "document.getElementById('dialog').open")
            command = await page.ask("document.querySelector('dialog .command').textContent")
            assert command == f"tunnel kick {tunnel['id']} {format_peer(visitor.socket.getsockname())}"
            await press(page, "Tab", "Enter")
            with pytest.raises(trio.BrokenResourceError):
                await visitor.receive_some(1)
            await until(page, "document.querySelector('.note.done')")


async def test_counts_are_live_and_a_tunnel_is_closed_with_the_mouse(tmp_path: Path, program_path: Find) -> None:
    async with shown(tmp_path, program_path) as (relay, page):
        await log_in(page, "root")
        await until(page, "document.querySelector('.empty').textContent.includes('tunnel expose')")
        tunnel = await opened(relay, "alice", "blog")
        visitors = "[...document.querySelectorAll('td.number')].find(cell => cell.dataset.title === 'Visitors')"
        async with visited(tunnel):
            await until(page, f"{visitors}?.textContent === '1'")
        await until(page, f"{visitors}?.textContent === '0'")
        await page.ask("document.querySelector('td.name a').click()")
        await until(page, "document.querySelector('main button.danger')?.closest('.buttons').hidden === false")
        await page.ask("document.querySelector('main button.danger').click()")
        assert await page.ask("document.activeElement.textContent") == "Cancel"
        await page.ask("document.querySelector('dialog input').click()")
        command = await page.ask("document.querySelector('dialog .command').textContent")
        assert command == f"tunnel close {tunnel['id']} --keep"
        await page.ask("document.querySelector('dialog button.danger').click()")
        await until(page, "document.querySelector('.phase').textContent === 'closed'")
        assert relay.daemon.service.tunnels() == []


async def test_a_user_sees_its_own_on_a_phone(tmp_path: Path, program_path: Find) -> None:
    async with shown(tmp_path, program_path) as (relay, page):
        await opened(relay, "alice", "blog-" + "x" * 40)
        await opened(relay, "root", "other")
        size = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
        await page.send("Emulation.setDeviceMetricsOverride", **size)
        await log_in(page, "alice")
        await until(page, "document.querySelectorAll('td.name').length === 1")
        for section in ("tunnels", "events", "bans"):  # the last of which is not for users
            await page.ask(f"location.hash = '{section}'")
            await until(page, "document.querySelector('main h2')")
            assert await page.ask("document.documentElement.scrollWidth") == 390
        assert await page.ask("getComputedStyle(document.querySelector('nav .all')).display") == "none"
        await page.ask("document.getElementById('logout').click()")
        await page.wait_for("Page.loadEventFired", 3)
        await until(page, "document.getElementById('secret')")
