"""Daemon and agent are stopped in various ways and started again, and the address is the same."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from tests.agent.support import echo, local_server, unused_port
from tests.support.peers import PATIENCE, connect, read_exactly
from tests.support.programs import EGTP, Daemon, daemon, program, tunnel_command
from tunneld.net.endpoint import Endpoint, Target

LONG = 3 * PATIENCE
"""Seconds of real time for a test with several processes, on a busy machine."""


async def asked(address: Endpoint) -> bytes:
    """Visit repeatedly until a visitor is served; returns the response."""
    while True:
        try:
            async with await connect(address) as stream:
                await stream.send_all(b"hello")
                if heard := await read_exactly(stream, 5):
                    return heard
        except (OSError, trio.BrokenResourceError):
            pass
        await trio.sleep(0.05)


class Agent:
    """`tunnel expose`, which can be stopped and started again."""

    def __init__(self, process: trio.Process) -> None:
        self.process = process
        self._pending = b""

    async def address(self) -> Endpoint:
        """Wait for the next address that it prints."""
        assert self.process.stdout is not None
        while b"\n" not in self._pending:
            self._pending += await self.process.stdout.receive_some(4096)
        line, _, self._pending = self._pending.partition(b"\n")
        return Endpoint.parse(line.decode())


@asynccontextmanager
async def agent(relay: int, target: Target, backend: str, *more: str) -> AsyncIterator[Agent]:
    words = ["expose", str(target), "--relay", f"127.0.0.1:{relay}", "--backend", backend, "--name", "web", "--quiet"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    async with program(tunnel_command(*words, *more), **options) as process:
        yield Agent(process)


async def end(process: trio.Process, number: signal.Signals) -> None:
    process.send_signal(number)
    await process.wait()


pytestmark = pytest.mark.parametrize("backend", ["webmux", "tcp", "egtp"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
async def test_a_restarted_agent_gets_its_address_back(tmp_path: Path, backend: str, number: signal.Signals) -> None:
    with trio.fail_after(LONG):
        async with daemon(tmp_path, words=EGTP) as relay, local_server(echo) as target:
            addresses = []
            for _ in range(2):
                async with agent(relay.control_port, target, backend) as running:
                    addresses.append(await running.address())
                    assert await asked(addresses[-1]) == b"hello"
                    await end(running.process, number)
            assert addresses[0] == addresses[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_a_restarted_daemon_gives_the_agent_its_address_back(
    tmp_path: Path, backend: str, number: signal.Signals
) -> None:
    control = unused_port()
    with trio.fail_after(LONG):
        async with (
            local_server(echo) as target,
            daemon(tmp_path, drain_timeout=0.1, control=control, words=EGTP) as relay,
            agent(control, target, backend) as running,
        ):
            address = await running.address()
            assert await asked(address) == b"hello"
            await end(relay.process, number)
            async with daemon(tmp_path, control=control, words=EGTP):
                assert await running.address() == address
                assert await asked(address) == b"hello"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_both_are_restarted_and_another_agent_comes_first(
    tmp_path: Path, backend: str, number: signal.Signals
) -> None:
    """The new daemon knows the owner of the address only from its stored reservations."""
    control = unused_port()
    with trio.fail_after(LONG):
        async with local_server(echo) as target:
            async with (
                daemon(tmp_path, drain_timeout=0.1, control=control, words=EGTP) as relay,
                agent(control, target, backend) as running,
            ):
                address = await running.address()
                server = await server_side(relay)
                await end(running.process, signal.SIGKILL)
                await end(relay.process, number)
            async with daemon(tmp_path, control=control, words=EGTP) as relay:
                said = await relay.ask(f"openTunnel client_port={address.port}")
                assert f"ERR limit could not open a tunnel: port {address.port} is reserved for tunnel 'web'" in said
                async with agent(control, target, backend) as running:
                    assert await running.address() == address
                    assert await server_side(relay) == server
                    assert await asked(address) == b"hello"


async def server_side(relay: Daemon) -> str:
    """The part of the server URI that belongs to the tunnel: its port, or its key with a shared port."""
    (line,) = [line for line in (await relay.ask("list")).splitlines() if line.startswith("* ")]
    uri = Endpoint.parse(next(word for word in line.split() if word.startswith("server=")).removeprefix("server="))
    return uri.key or str(uri.port)
