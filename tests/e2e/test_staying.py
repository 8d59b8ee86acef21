"""Restarts of the real daemon, which keep connections open."""

from __future__ import annotations

import hashlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.support.manager import manager
from tests.support.peers import PATIENCE, connect, is_refused, read_all, read_exactly
from tests.support.programs import Daemon, daemon, program, tunnel_command
from tunneld.net.endpoint import Endpoint

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="connections are handed over on Linux only"),
    pytest.mark.timeout(120),
]

BLOCK = random.Random(5).randbytes(1 << 20)
BLOCKS = 256
"""A download of 256 MiB, which takes a second or two on loopback."""


async def opened(relay: Daemon, *words: str) -> tuple[Endpoint, Endpoint]:
    """Open a tunnel; returns its server and client URI."""
    said = await relay.ask(f"openTunnel {' '.join(words)}")
    server = re.findall(r"OK (\w+://\S+)", said)[-1]
    client = re.findall(r"OK (\w+://\S+)", await relay.ask(f"getTunnelAddress {server}"))[-1]
    return Endpoint.parse(server), Endpoint.parse(client)


class Download:
    """A long download from the hidden server to a visitor. A test can pause it and wait for its progress."""

    def __init__(self, hidden: trio.SocketStream, visitor: trio.SocketStream) -> None:
        self.sent, self.received = hashlib.sha256(), hashlib.sha256()
        self.octets = 0
        self._hidden, self._visitor = hidden, visitor
        self._may_pass = 0  # octets: the visitor reads no further
        self._goes_on = self._stopped = trio.Event()

    async def send(self) -> None:
        for number in range(BLOCKS):
            block = number.to_bytes(4, "big") + BLOCK
            self.sent.update(block)
            await self._hidden.send_all(block)
        await self._hidden.send_eof()

    async def receive(self) -> None:
        while True:
            if self.octets >= self._may_pass:
                self._stopped.set()
                await self._goes_on.wait()
            if not (chunk := await self._visitor.receive_some(1 << 20)):
                return
            self.received.update(chunk)
            self.octets += len(chunk)

    def let_pass(self, octets: int) -> None:
        """Let the visitor read until it has received this many bytes."""
        self._may_pass, before = octets, self._goes_on
        self._goes_on, self._stopped = trio.Event(), trio.Event()
        before.set()

    async def reach(self, octets: int) -> None:
        self.let_pass(octets)
        await self._stopped.wait()


async def test_a_long_download_survives_two_restarts_and_new_visitors_are_served(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay:
        server, client = await opened(relay, "tcp", "persist=yes", "ttl=3600")
        download = Download(await connect(server), await connect(client))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(download.send)
            nursery.start_soon(download.receive)
            for number in (1, 2):
                await download.reach(number * BLOCKS // 3 << 20)
                pid = relay.process.pid
                relay.process.send_signal(signal.SIGUSR2)
                await relay.wait_logged("handing over", number)
                newcomer, its_server = await connect(client), await connect(server)  # nobody accepts now
                await newcomer.send_all(b"hello")
                await relay.wait_logged("ready", number + 1)
                assert await read_exactly(its_server, 5) == b"hello"
                assert relay.process.pid == pid
            download.let_pass(BLOCKS << 21)
        assert download.octets == BLOCKS * ((1 << 20) + 4)
        assert download.received.digest() == download.sent.digest()
        assert "served=3" in await relay.ask("list")


async def test_waiting_tunnels_are_kept(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay:
        once, many = await opened(relay, "tcp"), await opened(relay, "tcp", "persist=yes")
        early, parked = await connect(once[1]), await connect(many[0])
        await early.send_all(b"early")
        assert "restarting with 2 tunnels" in await relay.ask("restart")
        await relay.wait_logged("ready", 2)
        assert await read_exactly(await connect(once[0]), 5) == b"early"
        visitor = await connect(many[1])
        await visitor.send_all(b"late")
        assert await read_exactly(parked, 4) == b"late"


async def test_a_restart_into_a_program_that_would_not_start_fails(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay:
        server, client = await opened(relay, "tcp", "persist=yes")
        config = tmp_path / "tunnel.toml"
        config.write_text(config.read_text() + "\n[contrl]\n")
        said = await relay.ask("restart")
        assert "ERR config could not restart: the new program would not start: " in said
        assert "contrl" in said
        relay.process.send_signal(signal.SIGUSR2)
        assert "contrl" in (await relay.wait_logged("restart failed, nothing changed"))["reason"]
        hidden, visitor = await connect(server), await connect(client)
        await visitor.send_all(b"x")
        assert await read_exactly(hidden, 1) == b"x"


@pytest.mark.parametrize("by_shell", [False, True])
async def test_a_restart_runs_the_current_target_of_a_link_with_its_python(tmp_path: Path, by_shell: bool) -> None:
    script = "import sys\nfrom tunneld.cli.tunneld import main\nsys.exit(main())\n"
    if by_shell:  # as pip does where the path of Python is long or has a space
        start = "#!/bin/sh\n'''exec' \"{}\"{} \"$0\" \"$@\"\n' '''\n"
    elif " " in sys.executable:
        pytest.skip("the path of this Python has a space, which the first line of a script cannot have")
    else:
        start = "#!{}{}\n"
    for name, option in (("old", ""), ("new", " -Xnew")):
        (tmp_path / name).write_text(start.format(sys.executable, option) + script)
        (tmp_path / name).chmod(0o755)
    link = tmp_path / "tunneld"
    link.symlink_to("old")
    async with daemon(tmp_path, how=[str(link)]) as relay:
        process = Path(f"/proc/{relay.process.pid}")
        await relay.ask("restart")
        await relay.wait_logged("ready", 2)
        if not by_shell:
            assert (process / "comm").read_text() == "tunneld\n"  # what ps shows, still
        link.unlink()
        link.symlink_to("new")
        await relay.ask("restart")
        await relay.wait_logged("ready", 3)
        assert b"-Xnew" in (process / "cmdline").read_bytes().split(b"\0")


async def test_restarts_leak_no_descriptors(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay:
        server, client = await opened(relay, "tcp", "persist=yes")
        pair = await connect(server), await connect(client)
        await pair[1].send_all(b"x")
        await read_exactly(pair[0], 1)
        counts = []
        for number in range(2, 5):
            await relay.ask("restart")
            await relay.wait_logged("ready", number)
            await relay.ask("list")
            counts.append(relay.descriptors)
        assert len(set(counts)) == 1, counts


async def test_the_agent_of_a_webmux_tunnel_reconnects_to_the_same_address(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay, page() as port:
        command = tunnel_command("expose", str(port), "--relay", relay.control, "--json")
        async with program(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as agent:
            assert agent.stdout is not None
            said = b""
            with trio.fail_after(PATIENCE):
                while b'"opened"' not in said:
                    said += await some(agent.stdout)
            (tunnel,) = re.findall(r"client=(\S+)", await relay.ask("list"))
            await relay.ask("restart")
            await relay.wait_logged("ready", 2)
            visitor = await connect(Endpoint.parse(tunnel))  # waits until the agent is back
            assert await read_exactly(visitor, 5) == b"hello"
            with trio.fail_after(PATIENCE):
                while b'"resumed"' not in said:
                    said += await some(agent.stdout)


async def some(stream: trio.abc.ReceiveStream) -> bytes:
    chunk = bytes(await stream.receive_some())
    assert chunk, "it ended"
    return chunk


@asynccontextmanager
async def page() -> AsyncIterator[int]:
    """Run a local server that sends a greeting and disconnects; yields its port."""

    async def greet(stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError):  # a health probe does not wait for the greeting
            await stream.send_all(b"hello")

    async with trio.open_nursery() as nursery:
        (listener,) = await nursery.start(serve_tcp(greet))
        yield int(listener.socket.getsockname()[1])
        nursery.cancel_scope.cancel()


def serve_tcp(handler: Callable[[trio.SocketStream], Awaitable[None]]) -> Callable[..., Awaitable[Any]]:
    async def serve(task_status: trio.TaskStatus[list[trio.SocketListener]]) -> None:
        await trio.serve_tcp(handler, 0, host="127.0.0.1", task_status=task_status)

    return serve


# A service manager in between


async def test_systemd_keeps_connections_and_listeners_for_the_next_process(tmp_path: Path) -> None:
    async with manager(tmp_path) as systemd:
        async with systemd.service() as relay:
            before = relay.process.pid
            server, client = await opened(relay, "tcp", "persist=yes")
            hidden, visitor = await connect(server), await connect(client)
            await visitor.send_all(b"one")
            assert await read_exactly(hidden, 3) == b"one"
            assert await systemd.stop_for_restart(relay) == 0
        assert len(systemd.stored) == 1 + 3 + 2 + 2  # manifest, services, both sides of a tunnel, a connection
        await visitor.send_all(b"two")
        newcomer = await connect(client)
        async with systemd.service() as relay:
            assert relay.process.pid != before
            assert await read_exactly(hidden, 3) == b"two"
            its_server = await connect(server)
            await newcomer.send_all(b"x")
            assert await read_exactly(its_server, 1) == b"x"
            assert systemd.stored == []  # or what the daemon closes would stay open there
            await visitor.aclose()
            assert await read_all(hidden) == b""
            assert "id=t1 " in await relay.ask("list")


async def test_an_invalid_file_loses_no_connection_if_it_is_corrected(
    tmp_path: Path,
) -> None:
    async with manager(tmp_path) as systemd:
        async with systemd.service() as relay:
            server, client = await opened(relay, "tcp", "persist=yes")
            hidden, visitor = await connect(server), await connect(client)
            await visitor.send_all(b"one")
            assert await read_exactly(hidden, 3) == b"one"
            await systemd.stop_for_restart(relay)
        config, kept = tmp_path / "tunnel.toml", list(systemd.stored)
        right = config.read_text()
        for wrong in ("[contrl]\n", '[ssh]\nenabled = true\nport = 0\nhost_key = "tunnel.toml"\n'):
            config.write_text(right + wrong)
            status, said = await systemd.failed_start()
            assert status == os.EX_UNAVAILABLE
            notice = "connections of the previous process are kept until this is corrected"
            assert said.splitlines()[-1].startswith(notice)
            assert systemd.stored == kept
        config.write_text(right)
        async with systemd.service():
            await visitor.send_all(b"two")
            assert await read_exactly(hidden, 3) == b"two"


async def test_after_a_crash_the_next_process_starts_without_saved_state(tmp_path: Path) -> None:
    async with manager(tmp_path) as systemd:
        async with systemd.service() as relay:
            server, _client = await opened(relay, "tcp", "persist=yes")
            relay.process.kill()
        async with systemd.service() as relay:
            assert "OK 0 tunnels" in await relay.ask("list")
            assert await is_refused(server)


async def test_saved_state_of_another_version_is_ignored(tmp_path: Path) -> None:
    async with manager(tmp_path) as systemd:
        async with systemd.service() as relay:
            server, client = await opened(relay, "tcp", "persist=yes")
            hidden, visitor = await connect(server), await connect(client)
            await visitor.send_all(b"one")
            assert await read_exactly(hidden, 3) == b"one"
            await systemd.stop_for_restart(relay)
        name, _letter = systemd.stored.pop(0)
        assert name == "kept"
        async with systemd.service() as relay:
            told = await relay.wait_logged("the saved state of the previous process cannot be used")
            assert told["reason"] == "it is not a manifest of tunneld"
            assert (await relay.wait_logged("closed sockets that are not in the saved state"))["sockets"] == 7
            assert await read_all(visitor) == b""
            assert await is_refused(server)


async def test_connections_are_drained_if_systemd_does_not_keep_them(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay:
        server, client = await opened(relay, "tcp", "persist=yes")
        hidden, visitor = await connect(server), await connect(client)
        await visitor.send_all(b"x")
        assert await read_exactly(hidden, 1) == b"x"
        relay.process.send_signal(signal.SIGUSR1)
        await relay.wait_logged("systemd cannot keep connections for the next process (FDSTORE); draining them instead")
        await relay.wait_logged("draining")
        await visitor.aclose()
        await hidden.aclose()
        with trio.fail_after(PATIENCE):
            assert await relay.process.wait() == 0


# Socket activation


async def test_servers_listen_on_the_sockets_that_systemd_opened(tmp_path: Path) -> None:
    given = socket.create_server(("127.0.0.1", 0))
    port = given.getsockname()[1]
    async with manager(tmp_path, [("control", given)]) as systemd:
        early = await trio.open_tcp_stream("127.0.0.1", port)
        async with systemd.service() as relay, early:
            assert relay.control == f"tcp://127.0.0.1:{port}"
            assert (await read_exactly(early, 11)) == b"OK tunneld "
            said = await relay.ask("reload")
            assert "OK 0 keys changed" in said
            await systemd.stop_for_restart(relay)
        async with systemd.service() as relay:
            assert relay.control == f"tcp://127.0.0.1:{port}"


async def test_sockets_of_systemd_are_kept_over_a_restart(tmp_path: Path) -> None:
    given = socket.create_server(("127.0.0.1", 0))
    port = given.getsockname()[1]
    async with manager(tmp_path, [("control", given)]) as systemd, systemd.service() as relay:
        await relay.ask("restart")
        await relay.wait_logged("ready", 2)
        systemd.write(control=1)
        await relay.ask("reload")
        assert "OK 0 tunnels" in await relay.ask("list")
        assert relay.control == f"tcp://127.0.0.1:{port}"


async def test_a_socket_with_the_wrong_name_is_reported(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as given:
        async with manager(tmp_path, [("tunneld.socket", given.dup())]) as systemd:
            command, variables, fds = systemd.command()
            done = await trio.run_process(command, capture_stderr=True, check=False, pass_fds=fds, env=variables)
    assert done.returncode == 78
    assert done.stderr.decode() == (
        "systemd's socket 3, named 'tunneld.socket', matches no enabled service: FileDescriptorName= of "
        "its unit must be control or http or webmux\n"
    )


async def test_a_public_socket_of_systemd_needs_authentication_like_a_public_host(tmp_path: Path) -> None:
    async with manager(tmp_path, [("control", socket.create_server(("0.0.0.0", 0)))]) as systemd:
        command, variables, fds = systemd.command()
        done = await trio.run_process(command, capture_stderr=True, check=False, pass_fds=fds, env=variables)
    assert done.returncode == 78
    assert b'control.open_to_anyone: is false, but host "0.0.0.0" lets anyone open tunnels; add ' in done.stderr


async def test_tunnel_restart_waits_until_the_daemon_is_ready(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay:
        await opened(relay, "tcp", "persist=yes")
        done = await trio.run_process(tunnel_command("restart", "--relay", relay.control), capture_stdout=True)
        assert re.fullmatch(r"restarted as version \S+, with 1 tunnel and 0 visitors\n", done.stdout.decode())
        assert sum(line["event"] == "ready" for line in relay.log) == 2


async def test_an_agent_with_the_tcp_backend_keeps_its_visitor(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay, page() as port:
        command = tunnel_command("expose", str(port), "--relay", relay.control, "--backend", "tcp", "--json")
        async with program(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as agent:
            assert agent.stdout is not None
            said = b""
            with trio.fail_after(PATIENCE):
                while b'"opened"' not in said:
                    said += await some(agent.stdout)
                (client,) = re.findall(r"client=(\S+)", await relay.ask("list"))
                visitor = await connect(Endpoint.parse(client))
                assert await read_exactly(visitor, 5) == b"hello"
                await relay.ask("restart")
                while b'"resumed"' not in said:
                    said += await some(agent.stdout)
                newcomer = await connect(Endpoint.parse(client))
                assert await read_exactly(newcomer, 5) == b"hello"
            assert "served=2" in await relay.ask("list")
