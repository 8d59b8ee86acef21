"""Protected host names of a real relay, with curl as the visitor: passwords, shared links, an authentication server,
networks, the access log, and a restart.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import trio

from tests.support.exposed import agent_of
from tests.support.peers import PATIENCE
from tests.support.programs import Daemon, daemon, run, tunnel_command

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")

NAMES = """
[names]
domain = "t.example"
http = "127.0.0.1:0"
access_log = "json"
access_log_file = "access.log"
forward_auth = ["http://127.0.0.1:{port}/verify"]
forward_auth_cache = 0.0
"""


async def read_head(stream: trio.SocketStream) -> bytes:
    """The head of the next request; its body, of known length, is read and dropped. Empty at the end of file."""
    data = b""
    while b"\r\n\r\n" not in data:
        chunk = await stream.receive_some()
        if not chunk:
            return b""
        data += chunk
    head, _, body = data.partition(b"\r\n\r\n")
    length = re.search(rb"(?i)content-length: ([0-9]+)", head)
    while length is not None and len(body) < int(length[1]):
        body += await stream.receive_some()
    return head + b"\r\n\r\n"


async def echo(stream: trio.SocketStream) -> None:
    """A local server whose pages are the heads of the requests for them."""
    async with stream:
        with suppress(trio.BrokenResourceError):  # the relay closes connections that no visitor needs any more
            while head := await read_head(stream):
                await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(head), head))


async def verify(stream: trio.SocketStream) -> None:
    """An authentication server: alice has the cookie `session=alice`."""
    async with stream:
        with suppress(trio.BrokenResourceError):
            if b"session=alice" in await read_head(stream):
                answer = b"HTTP/1.0 200 OK\r\nRemote-User: alice\r\nContent-Length: 0\r\n\r\n"
            else:
                answer = b"HTTP/1.0 302 Found\r\nLocation: https://login.example/\r\nContent-Length: 0\r\n\r\n"
            await stream.send_all(answer)


async def serve(handler: Callable[[trio.SocketStream], object], nursery: trio.Nursery) -> int:
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    await nursery.start(partial(trio.serve_listeners, handler, listeners))  # type: ignore[arg-type]
    port: int = listeners[0].socket.getsockname()[1]
    return port


@dataclass
class Relay:
    """A relay with host names, and a local server."""

    daemon: Daemon
    port: int
    server: int
    verify: str
    folder: Path

    @asynccontextmanager
    async def expose(self, label: str, *options: str) -> AsyncIterator[str]:
        """Expose the local server as a host name; yields the address."""
        words = [str(self.server), "--relay", self.daemon.control, "--backend", "webmux", "--name", label]
        async with agent_of(*words, "--host", label, *options) as (_agent, address):
            yield str(address)

    async def curl(self, url: str, *options: str) -> str:
        """Visit; returns the head and the body."""
        resolve = ["--resolve", f"*:{self.port}:127.0.0.1"]
        return await run(["curl", "--silent", "--show-error", "--include", "--max-time", "30", *resolve, *options, url])

    async def tunnel(self, *words: str) -> str:
        """Run a command of `tunnel`."""
        return await run(tunnel_command(*words, "--relay", self.daemon.control))


@pytest.fixture
async def relay(tmp_path: Path, nursery: trio.Nursery) -> AsyncIterator[Relay]:
    asked, server = await serve(verify, nursery), await serve(echo, nursery)
    async with daemon(tmp_path, words=NAMES.format(port=asked)) as running:
        port = int((await running.wait_logged("names-http listens"))["uri"].rpartition(":")[2].strip("/"))
        yield Relay(running, port, server, f"http://127.0.0.1:{asked}/verify", tmp_path)


async def test_passwords_links_and_a_restart(relay: Relay) -> None:
    (relay.folder / "passwords").write_text("bob:battery-staple\n")
    (relay.folder / "passwords").chmod(0o600)
    given = ["--auth", "alice:correct-horse", "--auth-file", str(relay.folder / "passwords")]
    async with relay.expose("blog", *given) as url:
        assert (await relay.curl(url)).startswith("HTTP/1.1 401 ")
        assert (await relay.curl(url, "--user", "alice:wrong-horse")).startswith("HTTP/1.1 401 ")
        for login in ("alice:correct-horse", "bob:battery-staple"):
            page = await relay.curl(url, "--user", login)
            assert page.startswith("HTTP/1.1 200 ")
            assert "GET / HTTP/1.1" in page
            assert "authorization" not in page.lower()
        assert (await relay.curl(url, "--head")).startswith("HTTP/1.1 401 ")

        link = (await relay.tunnel("share", "blog", "--for", "2h")).strip()
        jar = ["--cookie-jar", str(relay.folder / "jar"), "--cookie", str(relay.folder / "jar")]
        page = await relay.curl(link, "--location", *jar)
        assert "HTTP/1.1 303 " in page
        assert "HTTP/1.1 200 " in page
        assert "tunneld-share" not in page.partition("GET / HTTP/1.1")[2]

        relay.daemon.process.send_signal(signal.SIGUSR2)
        await relay.daemon.wait_logged("ready", 2)
        with trio.fail_after(PATIENCE):
            while not (page := await relay.curl(url, *jar)).startswith("HTTP/1.1 200 "):
                assert page.startswith("HTTP/1.1 503 ")
                await trio.sleep(0.05)  # until the agent is back
        assert (await relay.curl(url)).startswith("HTTP/1.1 401 ")
        assert (await relay.curl(url, "--user", "bob:battery-staple")).startswith("HTTP/1.1 200 ")

        assert "revoked" in await relay.tunnel("share", "blog.t.example", "--revoke")
        assert (await relay.curl(url, *jar)).startswith("HTTP/1.1 401 ")
        assert (await relay.curl(link)).startswith("HTTP/1.1 403 ")


async def test_an_authentication_server_decides(relay: Relay) -> None:
    options = ["--forward-auth", relay.verify, "--forward-auth-fields", "Remote-User"]
    async with relay.expose("blog", *options) as url:
        page = await relay.curl(url)
        assert page.startswith("HTTP/1.1 302 ")
        assert "Location: https://login.example/" in page
        page = await relay.curl(url, "--cookie", "session=alice", "--header", "Remote-User: root")
        assert page.startswith("HTTP/1.1 200 ")
        assert "Remote-User: alice" in page
        assert "root" not in page


async def test_an_unknown_authentication_server_is_refused(relay: Relay) -> None:
    command = tunnel_command("expose", "1", "--relay", relay.daemon.control, "--backend", "webmux")
    command += ["--host", "blog", "--forward-auth", "http://127.0.0.1:1/"]
    with trio.fail_after(PATIENCE):
        done = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False)
    assert done.returncode != 0
    assert b"names.forward_auth" in done.stderr


async def test_refused_visitors_are_told_why(relay: Relay) -> None:
    async with relay.expose("blog", "--deny-from", "127.0.0.0/8") as url:
        assert (await relay.curl(url)).startswith("HTTP/1.1 403 ")
    async with relay.expose("shop", "--visitor-rate", "1/h") as url:
        assert (await relay.curl(url)).startswith("HTTP/1.1 200 ")
        assert (await relay.curl(url)).startswith("HTTP/1.1 429 ")


async def test_the_access_log_has_a_line_for_each_request(relay: Relay) -> None:
    log = relay.folder / "access.log"

    async def lines(count: int) -> list[dict[str, object]]:
        with trio.fail_after(PATIENCE):
            while True:
                found = log.read_text().splitlines() if log.exists() else []
                if len(found) >= count:
                    return [json.loads(line) for line in found]
                await trio.sleep(0.02)

    async with relay.expose("blog") as url:
        page = await relay.curl(f"{url}a?secret=1", "--data", "hello")
        await relay.curl(url.replace("blog", "none"))
        first, second = await lines(2)
        body = page.partition("\r\n\r\n")[2]
        assert (first["method"], first["path"], first["status"]) == ("POST", "/a", 200)
        assert (first["up"], first["down"]) == (5, len(body))
        assert (first["host"], first["client"], first["tunnel"]) == ("blog.t.example", "127.0.0.1", "t1")
        assert f"X-Request-Id: {first['id']}" in page
        assert (second["host"], second["status"], second["tunnel"]) == ("none.t.example", 404, "")
        log.rename(relay.folder / "access.log.1")
        relay.daemon.process.send_signal(signal.SIGHUP)
        while not log.exists():
            await relay.curl(url)
        assert (await lines(1))[0]["status"] == 200
