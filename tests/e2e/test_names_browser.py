"""Chromium shows the pages of two host names, each with a certificate from Pebble that it has verified itself.

two pages of one browser ──► names.https ──► two agents ──► two servers
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from tests.cli.test_init import Captured, made, on_any_port, relay_of
from tests.e2e.test_web import application
from tests.support.authority import running_authority
from tests.support.browser import Browser, Page, browser
from tests.support.named import DOMAIN, Named
from tests.support.page import PICTURES
from tests.support.peers import PATIENCE
from tests.support.programs import daemon, free_port, listening, program, tunnel_command

Find = Callable[[str], str]
LABELS = ("one", "two")
REQUESTS = 200
CONFIG = """
[names]
domain = "{domain}"
http = "127.0.0.1:{http}"
https = "127.0.0.1:{https}"
http2 = {http2}
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
async def two_names(folder: Path, find: Find, http2: str) -> AsyncIterator[tuple[Browser, int]]:
    """A relay whose two names have certificates, and a browser; yields it and the HTTPS port."""
    find("chromium")  # before the others start
    with running_authority(folder / "pebble") as authority:
        roots = folder / "roots.pem"
        authority.write_roots(roots)
        facts = {"directory": authority.directory, "ca_file": authority.ca_file, "domain": DOMAIN, "http2": http2}
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


@pytest.mark.parametrize(("http2", "protocol"), [("false", "http/1.1"), ("true", "h2")])
async def test_two_names_in_one_browser(tmp_path: Path, program_path: Find, http2: str, protocol: str) -> None:
    async with two_names(tmp_path, program_path, http2) as (running, port):
        pages = {label: await running.open_page() for label in LABELS}
        async with trio.open_nursery() as nursery:
            for label, page in pages.items():
                nursery.start_soon(use, page, label, port, protocol)
        for label, page in pages.items():
            (tmp_path / f"{label}.png").write_bytes(await page.screenshot())


async def use(page: Page, label: str, port: int, protocol: str) -> None:
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
        assert (response["securityState"], response["protocol"]) == ("secure", protocol), response
        assert response["securityDetails"]["sanList"] == [f"{label}.{DOMAIN}"]
        assert "Pebble" in response["securityDetails"]["issuer"]
    assert len({response["connectionId"] for response in secure}) <= 8
    assert sum(response["connectionReused"] for response in secure) > REQUESTS


async def test_the_first_example_of_the_readme(tmp_path: Path, program_path: Find, capsys: Captured) -> None:
    """`tunneld init --domain` and the command that it prints are enough, but for the ports and the authority."""
    program_path("chromium")
    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "index.html").write_text("<title>home</title><h1>hello from home</h1>")
    with running_authority(tmp_path / "pebble") as authority:
        authority.write_roots(tmp_path / "roots.pem")
        line = made(tmp_path, capsys, "--domain", DOMAIN, "--agree")
        on_any_port(tmp_path / "tunnel.toml")
        text = (tmp_path / "tunnel.toml").read_text()
        for was, now in (
            ('":80"', f'"127.0.0.1:{authority.http_port}"'),
            ('":443"', f'"127.0.0.1:{authority.tls_port}"'),
            ("\n[acme]", f'\n[acme]\ndirectory = "{authority.directory}"\nca_file = "{authority.ca_file}"'),
        ):
            assert was in text
            text = text.replace(was, now)
        (tmp_path / "tunnel.toml").write_text(text)
        port = await free_port()
        server = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", "-d", str(tmp_path / "www"), str(port)]
        async with (
            listening(server, port),
            relay_of(tmp_path / "tunnel.toml") as relay,
            browser(tmp_path, program_path, f"*.{DOMAIN}", tmp_path / "roots.pem") as running,
        ):
            where = [
                "--relay",
                f"tls://127.0.0.1:{relay.control_port}",
                "--credential",
                line.credential,
                "--pin",
                line.pin,
            ]
            command = tunnel_command("expose", str(port), "--host", line.host, *where)
            environment = os.environ | {"TUNNEL_SECRET": line.secret}
            async with program(command, stdout=subprocess.PIPE, env=environment) as agent:
                assert agent.stdout is not None
                with trio.fail_after(PATIENCE):
                    address = (await agent.stdout.receive_some()).decode().strip()
                assert address == url("blog", authority.tls_port)
                await relay.wait_logged("certificate stored")
                page = await running.open_page()
                await page.visit(address)
                assert await page.ask("document.title + location") == f"home{address}"
