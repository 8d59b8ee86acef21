"""Clients other than OpenSSH: PuTTY's plink, dropbear's dbclient, paramiko, autossh. Each with a key, end to end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import paramiko
import pytest
import trio

from tests.agent.support import echo, local_server, unused_port
from tests.agent.test_expose import ask
from tests.backends.ssh.support import HOST_KEY, Relay, client, make_key, openssh, relay
from tests.engine.bench import NOISE
from tests.support.credentials import credential
from tests.support.peers import PATIENCE, connect, read_all, read_exactly
from tests.support.programs import program, tunnel_command
from tunneld.config.credentials import Credential
from tunneld.net.endpoint import Endpoint, Target

LOCAL = "127.0.0.1"
Find = Callable[[str], str]


def run(*command: str | Path) -> None:
    """Run a program to completion."""
    subprocess.run([str(word) for word in command], check=True, stdin=subprocess.DEVNULL, capture_output=True)


@pytest.fixture
def key(tmp_path: Path) -> tuple[Path, Credential]:
    """A key in OpenSSH's format, and its credential."""
    path, line = make_key(tmp_path)
    return path, credential("me", authorized_keys=[line])


async def check_relaying(address: Endpoint) -> None:
    """Transfer much and little in both directions, at once and after an end of file."""
    assert await ask(address, NOISE) == NOISE
    assert await ask(address, b"") == b""
    answers: list[bytes] = []

    async def visit(number: int) -> None:
        answers.append(await ask(address, b"%03d" % number * 1000))

    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(visit, number)
    assert sorted(answers) == [b"%03d" % number * 1000 for number in range(20)]


async def test_plink(program_path: Find, tmp_path: Path, key: tuple[Path, Credential]) -> None:
    plink, port = program_path("plink"), unused_port()
    run(program_path("puttygen"), key[0], "-O", "private", "-o", tmp_path / "id.ppk")
    with trio.fail_after(PATIENCE):
        async with relay([key[1]]) as here, local_server(echo) as target:
            trust: list[str | Path] = ["-batch", "-hostkey", HOST_KEY.get_fingerprint(), "-i", tmp_path / "id.ppk"]
            forward = ["-N", "-R", f"{port}:{LOCAL}:{target.port}", "-P", str(here.port), "me@127.0.0.1"]
            home = os.environ | {"HOME": str(tmp_path)}  # it creates a directory there
            async with client([plink, "-ssh", *trust, *forward], env=home) as process:
                (tunnel,) = await here.until_served()
                assert (tunnel.client_uri.port, tunnel.spec.owner) == (port, "me")
                await check_relaying(tunnel.client_uri)
                process.process.send_signal(signal.SIGTERM)
                await here.until(lambda: not tunnel.parked)


async def test_dbclient(program_path: Find, tmp_path: Path, key: tuple[Path, Credential]) -> None:
    dbclient = program_path("dbclient")
    run(program_path("dropbearconvert"), "openssh", "dropbear", key[0], tmp_path / "id.dropbear")
    with trio.fail_after(PATIENCE):
        async with relay([key[1]]) as here, local_server(echo) as target:
            trust: list[str | Path] = ["-y", "-y", "-i", tmp_path / "id.dropbear"]
            forward = ["-N", "-R", f"0:{LOCAL}:{target.port}", "-p", str(here.port), "me@127.0.0.1"]
            home = os.environ | {"HOME": str(tmp_path)}
            async with client([dbclient, *trust, *forward], env=home) as process:
                port = await process.port()
                (tunnel,) = await here.until_served()
                assert (tunnel.client_uri.port, tunnel.spec.owner) == (port, "me")
                await check_relaying(tunnel.client_uri)


class Paramiko:
    """A client that is a Python program, with its own threads."""

    def __init__(self, here: Relay, key: Path, target: Target) -> None:
        self._target = target
        self._servers: list[socket.socket] = []
        self.originators: list[tuple[str, int]] = []
        self._client = paramiko.SSHClient()
        self._client.set_missing_host_key_policy(paramiko.AutoAddPolicy())
        self._client.connect(
            LOCAL, here.port, "me", pkey=paramiko.Ed25519Key.from_private_key_file(str(key)), allow_agent=False
        )
        transport = self._client.get_transport()
        assert transport is not None
        self.port = transport.request_port_forward("", 0, self._take)

    def _take(self, channel: paramiko.Channel, origin: tuple[str, int], _server: tuple[str, int]) -> None:
        self.originators.append(origin)
        server = socket.create_connection((self._target.host, self._target.port))
        self._servers.append(server)
        for source, sink, end in (
            (channel, server, lambda: server.shutdown(socket.SHUT_WR)),
            (server, channel, channel.shutdown_write),
        ):
            threading.Thread(target=self._copy, args=(source, sink, end), daemon=True).start()

    @staticmethod
    def _copy(
        source: paramiko.Channel | socket.socket, sink: paramiko.Channel | socket.socket, end: Callable[[], None]
    ) -> None:
        with suppress(OSError, EOFError):
            while data := source.recv(65536):
                sink.sendall(data)
            end()

    def close(self) -> None:
        self._client.close()
        for server in self._servers:
            server.close()


async def test_paramiko_and_the_originators_of_visitors(key: tuple[Path, Credential]) -> None:
    with trio.fail_after(PATIENCE):
        async with relay([key[1]]) as here, local_server(echo) as target:
            hidden = await trio.to_thread.run_sync(Paramiko, here, key[0], target)
            (tunnel,) = await here.until_served()
            assert hidden.port == tunnel.client_uri.port
            await check_relaying(tunnel.client_uri)
            visitor = await connect(tunnel.client_uri, source="127.0.0.7")
            await visitor.send_eof()
            assert await read_all(visitor) == b""
            assert hidden.originators[-1] == ("127.0.0.7", visitor.socket.getsockname()[1])
            await trio.to_thread.run_sync(hidden.close)


async def test_hide_visitor_hides_the_originator(tmp_path: Path) -> None:
    with trio.fail_after(PATIENCE):
        async with relay() as here, local_server(echo) as target:
            tunnel = await here.open(hide_visitor="yes")
            command = openssh(
                here, "-vv", "-N", "-R", f"0:{LOCAL}:{target.port}", LOCAL, user=str(tunnel.server_uri.key)
            )
            async with client(command) as ssh:
                await here.until_served()
                assert await ask(tunnel.client_uri, b"hello") == b"hello"
                assert "originator 0.0.0.0 port 0" in (await ssh.wait_output(r"client_request_forwarded_tcpip.*"))[0]


# autossh and a relay that is restarted

CONFIG = """
[control]
port = 0
[http]
port = 0
[webmux]
port = 0
[tunnels]
ports = "0"
[ssh]
enabled = true
port = {port}
[daemon]
state = "state"
"""


def daemon(config: Path) -> list[str]:
    return [sys.executable, "-c", "from tunneld.cli.tunneld import main; main()", "--config", str(config)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_under_autossh_a_restart_of_the_relay_changes_no_address(
    program_path: Find, tmp_path: Path, number: signal.Signals
) -> None:
    autossh, port = program_path("autossh"), unused_port()
    config = tmp_path / "tunnel.toml"
    config.write_text(CONFIG.format(port=port))
    environment = os.environ | {"AUTOSSH_GATETIME": "0", "AUTOSSH_POLL": "5"}
    twice = r"(?s)Allocated port (\d+).*Allocated port (\d+)"
    with trio.fail_after(3 * PATIENCE):
        async with local_server(echo) as target, program(daemon(config), stderr=subprocess.DEVNULL) as first:
            command = openssh(port, "-N", "-R", f"0:{LOCAL}:{target.port}", LOCAL)
            async with client([autossh, "-M", "0", *command[1:]], env=environment) as ssh:
                address = Endpoint("tcp", LOCAL, await ssh.port())
                assert await ask(address, b"before") == b"before"
                first.send_signal(number)
                await first.wait()
                async with program(daemon(config), stderr=subprocess.DEVNULL):
                    found = await ssh.wait_output(twice)
                    assert found[1] == found[2]
                    assert await ask(address, b"after") == b"after"
                    ssh.process.send_signal(signal.SIGTERM)
                    await ssh.ended()


async def test_a_restart_with_a_handover_keeps_the_tunnel_open_for_its_client(
    program_path: Find, tmp_path: Path
) -> None:
    autossh, port, control = program_path("autossh"), unused_port(), unused_port()
    config = tmp_path / "tunnel.toml"
    config.write_text(CONFIG.format(port=port).replace("[control]\nport = 0", f"[control]\nport = {control}"))
    environment = os.environ | {"AUTOSSH_GATETIME": "0", "AUTOSSH_POLL": "5"}
    with trio.fail_after(3 * PATIENCE):
        async with local_server(echo) as target, program(daemon(config), stderr=subprocess.DEVNULL):
            command = openssh(port, "-N", "-R", f"0:{LOCAL}:{target.port}", LOCAL)
            async with client([autossh, "-M", "0", *command[1:]], env=environment) as ssh:
                address = Endpoint("tcp", LOCAL, await ssh.port())
                restart = tunnel_command("restart", "--relay", f"{LOCAL}:{control}")
                await trio.run_process(restart, capture_stdout=True)
                visitor = await connect(address)  # the port is open all the time, and visitors wait
                await visitor.send_all(b"hello")
                assert await read_exactly(visitor, 5) == b"hello"
                listed = await trio.run_process(
                    tunnel_command("list", "--relay", f"{LOCAL}:{control}"), capture_stdout=True
                )
                assert b"t1" in listed.stdout
                ssh.process.send_signal(signal.SIGTERM)
                await ssh.ended()
