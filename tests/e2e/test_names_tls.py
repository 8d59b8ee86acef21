"""Host names whose TLS does not end at the relay: at the local server, or at the agent with --https-here."""

from __future__ import annotations

import os
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import trio

from tests.support.authority import Authority, running_authority
from tests.support.peers import PATIENCE
from tests.support.pki import Pki
from tests.support.programs import Daemon, daemon, free_port, listening, program, run, tunnel_command

Find = Callable[[str], str]
NAME = "blog.t.example"
NAMES = """
[names]
domain = "t.example"
http = "127.0.0.1:{http}"
https = "127.0.0.1:{https}"
"""


@asynccontextmanager
async def relay_with_names(
    folder: Path, https: int = 0, pki: Pki | None = None, http: int = 0
) -> AsyncIterator[tuple[Daemon, int, int]]:
    """A relay with host names; yields it and its HTTP and HTTPS ports."""
    http, https = http or await free_port(), https or await free_port()
    async with daemon(folder, pki=pki, words=NAMES.format(http=http, https=https)) as relay:
        yield relay, http, https


@asynccontextmanager
async def agent(relay: Daemon, target: object, *words: str, state: Path | None = None) -> AsyncIterator[Agent]:
    """`tunnel expose` with these words."""
    environment = os.environ | ({"XDG_STATE_HOME": str(state)} if state else {})
    where = [] if "--relay" in words else ["--relay", relay.control]
    name = [] if "--host" in words else ["--host", "blog"]
    command = tunnel_command("expose", str(target), *where, *name, *words)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    async with program(command, env=environment, **pipes) as process, trio.open_nursery() as nursery:
        running = Agent(process)
        nursery.start_soon(running.listen, process.stderr)
        nursery.start_soon(running.listen, process.stdout)
        await running.wait_said(f"://{NAME}")
        yield running
        nursery.cancel_scope.cancel()


class Agent:
    """What `tunnel expose` has printed."""

    def __init__(self, process: trio.Process) -> None:
        self.process = process
        self.said = ""
        self._more = trio.Event()

    async def listen(self, pipe: trio.abc.ReceiveStream | None) -> None:
        assert pipe is not None
        async for chunk in pipe:
            self.said += chunk.decode()
            self._more.set()
            self._more = trio.Event()

    async def wait_said(self, text: str) -> None:
        with trio.fail_after(PATIENCE):
            while text not in self.said:
                assert self.process.returncode is None, self.said
                await self._more.wait()


async def serve_tls(pki: Pki, *, task_status: trio.TaskStatus[int]) -> None:
    """A TLS server that answers in capitals."""

    async def answer(stream: trio.SSLStream[trio.SocketStream]) -> None:
        with suppress(trio.BrokenResourceError):  # an agent that the test kills takes the last bytes with it
            while data := await stream.receive_some():
                await stream.send_all(data.upper())
        await trio.aclose_forcefully(stream)

    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    task_status.started(listener.socket.getsockname()[1])
    await trio.serve_listeners(answer, [trio.SSLListener(listener, pki.server)])


def keys_below(folder: Path, left_out: Path) -> list[Path]:
    """The files with private keys."""
    files = [path for path in folder.rglob("*") if path.is_file() and left_out not in path.parents]
    return [path for path in files if b"PRIVATE KEY" in path.read_bytes()]


def curl(find: Find, name: str, port: int, *words: str) -> list[str]:
    return [find("curl"), "-sS", "--max-time", "30", "--resolve", f"{name}:{port}:127.0.0.1", *words]


@pytest.mark.parametrize("backend", ["webmux", "tcp"])
async def test_a_local_server_keeps_its_tls(
    tmp_path: Path, program_path: Find, nursery: trio.Nursery, backend: str
) -> None:
    pki = Pki.issue(tmp_path / "pki", NAME)
    port = await nursery.start(serve_tls, pki)
    words = ["--tls", "pass", "--backend", backend]
    async with relay_with_names(tmp_path) as (relay, http, https), agent(relay, port, *words):
        stream = trio.SSLStream(await trio.open_tcp_stream("127.0.0.1", https), pki.client, server_hostname=NAME)
        await stream.send_all(b"hello")
        assert await stream.receive_some() == b"HELLO"
        await stream.aclose()
        said = await run(curl(program_path, NAME, http, "-i", f"http://{NAME}:{http}/page"))
        assert f"location: https://{NAME}:{https}/page".lower() in said.lower()


async def test_a_connection_that_is_passed_on_survives_a_restart(tmp_path: Path, nursery: trio.Nursery) -> None:
    pki = Pki.issue(tmp_path / "pki", NAME)
    port = await nursery.start(serve_tls, pki)
    async with (
        relay_with_names(tmp_path) as (relay, _http, https),
        agent(relay, port, "--tls", "pass", "--backend", "tcp"),
    ):
        stream = trio.SSLStream(await trio.open_tcp_stream("127.0.0.1", https), pki.client, server_hostname=NAME)
        for times in (1, 2):
            await stream.send_all(b"hello")
            assert await stream.receive_some() == b"HELLO"
            assert "restarting with 1 tunnel" in await relay.ask("restart")
            await relay.wait_logged("ready", times + 1)
        await stream.send_all(b"again")
        assert await stream.receive_some() == b"AGAIN"
        await stream.aclose()
        assert f"client=https://{NAME}:{https}/" in await relay.ask("list")


@asynccontextmanager
async def web(folder: Path) -> AsyncIterator[int]:
    """A web server with a page; yields its port."""
    (folder / "www").mkdir()
    (folder / "www" / "page").write_text("a page")
    port = await free_port()
    command = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", "-d", str(folder / "www"), str(port)]
    async with listening(command, port):
        yield port


async def test_the_agent_obtains_its_certificate_and_its_key_stays_there(tmp_path: Path, program_path: Find) -> None:
    folder, state = tmp_path / "relay", tmp_path / "agent"
    folder.mkdir()
    with running_authority(tmp_path / "pebble") as authority:
        authority.write_roots(tmp_path / "roots.pem")
        acme = acme_words(authority)
        async with web(tmp_path) as port, relay_with_names(folder, authority.tls_port) as (relay, _http, https):
            visit = curl(program_path, NAME, https, "--cacert", str(tmp_path / "roots.pem"))
            visit.append(f"https://{NAME}:{https}/page")
            async with agent(relay, port, *acme, state=state) as running:
                await running.wait_said(f"certificate for {NAME}")
                assert await run(visit) == "a page"
                running.process.terminate()  # a killed agent would leave its tunnel open for a while
                await running.process.wait()
            keys = keys_below(tmp_path, authority.folder)
            assert len(keys) == 2  # of the account, and of the certificate
            assert all(state in path.parents for path in keys)
            assert {path.stat().st_mode & 0o777 for path in keys} == {0o600}
            async with agent(relay, port, *acme, "--backend", "tcp", state=state) as running:
                assert await run([*visit, "--retry", "5", "--retry-all-errors"]) == "a page"
                assert "certificate for" not in running.said  # the stored one is used


async def test_why_there_is_no_certificate_is_reported(tmp_path: Path, program_path: Find) -> None:
    with running_authority(tmp_path / "pebble") as authority:
        async with web(tmp_path) as port, relay_with_names(tmp_path) as (relay, _http, https):
            words = acme_words(authority)
            async with agent(relay, port, *words, state=tmp_path / "agent") as running:
                await running.wait_said(f"could not get a certificate for {NAME}: {NAME}: ")
                await running.wait_said("(tls-alpn-01); check that the name leads to the relay")
                visitor = trio.SSLStream(
                    await trio.open_tcp_stream("127.0.0.1", https), ssl.create_default_context(), server_hostname=NAME
                )
                with pytest.raises(trio.BrokenResourceError) as failed:
                    await visitor.do_handshake()
                assert "UNRECOGNIZED_NAME" in str(failed.value.__cause__)
                await trio.aclose_forcefully(visitor)


def acme_words(authority: Authority) -> list[str]:
    """The options of an agent that gets its certificate from this authority."""
    words = ["--https-here", "--acme-agree", "--acme-directory", authority.directory]
    return [*words, "--acme-ca-file", str(authority.ca_file)]


async def test_an_agent_needs_only_the_https_port(tmp_path: Path, program_path: Find) -> None:
    pki = Pki.issue(tmp_path / "pki")
    async with (
        web(tmp_path) as port,
        relay_with_names(tmp_path, pki=pki) as (relay, http, https),
        agent(relay, port, "--relay", f"tls://localhost:{https}", "--pin", pki.pin) as running,
    ):
        page = f"http://{NAME}:{http}/page"
        assert await run(curl(program_path, NAME, http, page)) == "a page"
        ports = [each for each in remote_ports(running.process.pid) if each != port]  # but for the web server's
        assert ports == [https, https]  # the control connection and a carrier


def remote_ports(pid: int) -> list[int]:
    """The ports to which a process has connections."""
    links = [link.readlink().name for link in Path(f"/proc/{pid}/fd").iterdir()]
    inodes = {link.removeprefix("socket:[").removesuffix("]") for link in links if link.startswith("socket:[")}
    lines = [line.split() for table in ("tcp", "tcp6") for line in Path(f"/proc/net/{table}").read_text().splitlines()]
    return [int(line[2].rpartition(":")[2], 16) for line in lines if len(line) > 9 and line[9] in inodes]
