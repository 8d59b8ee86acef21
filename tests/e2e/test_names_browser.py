"""Chromium shows the pages of two host names, each with a certificate from Pebble that it has verified itself.

two pages of one browser ──► names.https ──► two agents ──► two servers
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from tests.e2e.test_web import application
from tests.support.authority import running_authority
from tests.support.browser import Browser, Page, browser
from tests.support.named import DOMAIN, Named
from tests.support.page import PICTURES
from tests.support.programs import daemon

Find = Callable[[str], str]
LABELS = ("one", "two")
REQUESTS = 200
CONFIG = """
[names]
domain = "{domain}"
http = "127.0.0.1:{http}"
https = "127.0.0.1:{https}"
[acme]
enabled = true
agree = true
directory = "{directory}"
ca_file = "{ca_file}"
"""

ASK_ALL = """
(async () => Promise.all([...Array(%d).keys()].map(async number => (await fetch(`/whose/${number}`)).text())))()
"""
ECHO = """
new Promise((kept, broken) => {
    const socket = new WebSocket(`wss://${location.host}/echo`), heard = [], sent = ["hello", "ä".repeat(70000)]
    socket.onopen = () => sent.forEach(text => socket.send(text))
    socket.onmessage = event => {
        heard.push(event.data)
        if (heard.length == sent.length) kept(heard.join() == sent.join())
    }
    socket.onerror = () => broken("the WebSocket failed")
})
"""
EVENTS = """
new Promise((kept, broken) => {
    const source = new EventSource("/events"), heard = []
    source.onmessage = event => {
        heard.push(event.data)
        if (heard.length < 5) fetch("/tick", { method: "POST" })
        else { source.close(); kept(heard.join()) }
    }
    source.onerror = () => broken("the event source failed")
})
"""


@asynccontextmanager
async def two_names(folder: Path, find: Find) -> AsyncIterator[tuple[Browser, int]]:
    """A relay whose two names have certificates, and a browser; yields it and the HTTPS port."""
    find("chromium")  # before the others start
    with running_authority(folder / "pebble") as authority:
        roots = folder / "roots.pem"
        authority.write_roots(roots)
        facts = {"directory": authority.directory, "ca_file": authority.ca_file, "domain": DOMAIN}
        words = CONFIG.format(http=authority.http_port, https=authority.tls_port, **facts)
        async with (
            application(LABELS[0]) as one,
            application(LABELS[1]) as two,
            daemon(folder, words=words) as relay,
            browser(folder, find, f"*.{DOMAIN}", roots) as running,
        ):
            site = Named(relay, authority.http_port, "webmux")
            async with site.expose(LABELS[0], one), site.expose(LABELS[1], two):
                await relay.wait_logged("certificate stored", 2)
                yield running, authority.tls_port


def url(label: str, port: int) -> str:
    return f"https://{label}.{DOMAIN}:{port}/"


async def test_two_names_in_one_browser(tmp_path: Path, program_path: Find) -> None:
    async with two_names(tmp_path, program_path) as (running, port):
        pages = {label: await running.open_page() for label in LABELS}
        async with trio.open_nursery() as nursery:
            for label, page in pages.items():
                nursery.start_soon(use, page, label, port)
        for label, page in pages.items():
            (tmp_path / f"{label}.png").write_bytes(await page.screenshot())


async def use(page: Page, label: str, port: int) -> None:
    """Do all that a page does."""
    await page.visit(url(label, port))
    shown = "[...document.images].filter(image => image.complete && image.naturalWidth).length"
    assert await page.ask(shown) == PICTURES
    assert await page.ask("document.title") == label
    assert await page.ask(ASK_ALL % REQUESTS) == [f"{number} {label}" for number in range(REQUESTS)]
    assert await page.ask(ECHO) is True
    assert await page.ask(EVENTS) == "0,1,2,3,4"
    responses = [event["response"] for event in page.events["Network.responseReceived"]]
    secure = [response for response in responses if response["url"].startswith("https:")]
    assert len(secure) > REQUESTS + PICTURES
    for response in secure:
        assert (response["securityState"], response["protocol"]) == ("secure", "http/1.1"), response
        assert response["securityDetails"]["sanList"] == [f"{label}.{DOMAIN}"]
        assert "Pebble" in response["securityDetails"]["issuer"]
    assert len({response["connectionId"] for response in secure}) <= 8
    assert sum(response["connectionReused"] for response in secure) > REQUESTS
