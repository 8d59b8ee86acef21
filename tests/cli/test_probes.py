"""The ready file, the status server and systemd, of an agent as a process."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from tests.agent.support import PATIENCE, echo, local_server, relay_here
from tests.support.programs import free_port, program, tunnel_command
from tunneld.cli.probes import parse_status_address
from tunneld.errors import UsageError


class Manager:
    """The socket of $NOTIFY_SOCKET, at systemd's end."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "notify"
        self._end = trio.socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[dict[str, str]]:
        """Listen; yields the environment of the agent."""
        with self._end:
            await self._end.bind(str(self.path))
            yield {**os.environ, "NOTIFY_SOCKET": str(self.path), "WATCHDOG_USEC": "2000000"}

    async def wait_for(self, text: str) -> str:
        while text not in (message := (await self._end.recv(4096)).decode()):
            pass
        return message


async def test_the_ready_file_and_systemd_follow_the_tunnel(tmp_path: Path) -> None:
    file, manager = tmp_path / "ready", Manager(tmp_path)
    file.write_text("of an agent that was killed")
    with trio.fail_after(PATIENCE):
        async with manager.listening() as environment, relay_here() as relay, local_server(echo) as target:
            words = ("expose", str(target.port), "--http", "--relay", relay.where, "--ready-file", str(file))
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment}
            async with program(tunnel_command(*words), **quiet) as process:
                ready = await manager.wait_for("READY=1")
                assert ready == "READY=1\nSTATUS=1 of 1 exposure reachable, 0 visitors"
                await manager.wait_for("WATCHDOG=1")
                assert file.read_text() == f"http://{relay.tunnel.client_uri.authority}/\n"
                relay.stop()
                lost = await manager.wait_for("0 of 1 exposure reachable")
                assert "WATCHDOG=1" in lost
                assert not file.exists()
                process.terminate()
                await manager.wait_for("STOPPING=1")
                await process.wait()


async def test_up_without_a_relay_has_started_but_is_not_ready(tmp_path: Path) -> None:
    (tmp_path / "expose.toml").write_text(f'[relay]\nwhere = "127.0.0.1:{await free_port()}"\n[expose.a]\ntarget = 9\n')
    file, manager = tmp_path / "ready", Manager(tmp_path)
    with trio.fail_after(PATIENCE):
        words = ("up", "--file", str(tmp_path / "expose.toml"), "--ready-file", str(file), "--status-address", "0")
        command = tunnel_command(*words)
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        async with manager.listening() as environment, program(command, env=environment, **pipes) as process:
            assert process.stderr is not None
            line = (await process.stderr.receive_some()).decode().splitlines()[0]
            assert (await manager.wait_for("READY=1")).startswith("READY=1\nSTATUS=0 of 1 exposure reachable, 0 visi")
            assert not file.exists()
            host, _, port = line.removeprefix("the status is at http://").rstrip("/").rpartition(":")
            async with await trio.open_tcp_stream(host, int(port)) as stream:
                await stream.send_all(b"GET /readyz HTTP/1.1\r\n\r\n")
                assert b" 503 " in await stream.receive_some()


async def test_a_ready_file_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "folder"
    file.mkdir()
    done = await trio.run_process(
        tunnel_command("expose", "9", "--ready-file", str(file)), check=False, capture_stderr=True
    )
    assert done.returncode == 64
    assert f"could not write the ready file {file}: " in done.stderr.decode()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("9090", ("127.0.0.1", 9090)),
        ("0.0.0.0:80", ("0.0.0.0", 80)),
        ("[::1]:80", ("::1", 80)),
        ("0", ("127.0.0.1", 0)),
    ],
)
def test_the_status_address_is_on_loopback_by_default(text: str, expected: tuple[str, int]) -> None:
    assert parse_status_address(text) == expected


@pytest.mark.parametrize("text", ["example.org:80", "70000", ":80", "x", "127.0.0.1"])
def test_other_status_addresses_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_status_address(text)
