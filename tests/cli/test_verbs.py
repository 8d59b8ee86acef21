"""`tunnel drain --wait` prints the number of remaining visitors; its exit status says whether all of them left."""

from __future__ import annotations

import os
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from tests.agent.support import PATIENCE, RelayHere, relay_here
from tests.support.peers import connect
from tests.support.programs import program, tunnel_command
from tests.support.scripted_relays import GREETING, fake_relay, stay
from tunneld.client import connect as control
from tunneld.net.endpoint import Endpoint


async def served(relay: RelayHere, count: int) -> tuple[str, list[trio.SocketStream]]:
    """Open a tunnel with this many visitors; returns its id and both streams of each visitor."""
    async with control(relay.where) as client:
        server = Endpoint.parse(await client.open_tunnel("tcp", persist=True))
        address = Endpoint.parse(await client.get_tunnel_address(str(server)))
        (tunnel,) = await client.list()
    streams = []
    for _ in range(count):
        hidden, visitor = await connect(server), await connect(address)
        await hidden.send_all(b"x")
        assert await visitor.receive_some(1) == b"x"
        streams += [hidden, visitor]
    return tunnel["id"], streams


@asynccontextmanager
async def draining(relay: RelayHere, tunnel: str) -> AsyncIterator[trio.Process]:
    with trio.fail_after(PATIENCE):
        command = tunnel_command("drain", "--wait", tunnel, "--relay", relay.where)
        async with program(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            yield process


async def line(process: trio.Process) -> str:
    """The next line of standard output."""
    assert process.stdout is not None
    said = b""
    while not said.endswith(b"\n"):
        said += await process.stdout.receive_some(1)
    return said.decode()


async def test_the_number_of_visitors_is_printed_each_time_one_leaves() -> None:
    async with relay_here() as relay:
        tunnel, streams = await served(relay, 2)
        async with draining(relay, tunnel) as process:
            assert await line(process) == f"draining {tunnel}, 2 visitors left\n"
            for left in (1, 0):
                await streams.pop().aclose()
                await streams.pop().aclose()
                assert await line(process) == f"{left} visitor{'' if left == 1 else 's'} still connected\n"
            assert await line(process) == "drained\n"
            assert await process.wait() == os.EX_OK


@pytest.mark.parametrize("code", ["no-such-tunnel", "ended"])
@pytest.mark.parametrize(("reason", "status"), [("drained", os.EX_OK), ("closed by request", os.EX_TEMPFAIL)])
async def test_a_tunnel_that_closes_before_it_is_watched_is_reported(code: str, reason: str, status: int) -> None:
    over = trio.Event()

    async def serve(stream: trio.SocketStream) -> None:
        await stream.send_all(GREETING)
        match await line_of(stream):
            case "watch t1":
                await stream.send_all(b"* event=watching id=t1\n")
                await over.wait()
                await stream.send_all(f"* event=closed id=t1 reason={reason!r}\n".replace("'", '"').encode())
            case "drain t1":
                await stream.send_all(b"OK draining t1, 0 visitors left\n")
                assert await line_of(stream) == "show t1"
                over.set()
                await stream.send_all(f"ERR {code} it is gone\n".encode())
        await stay(stream)

    async with fake_relay(serve) as relay:
        done = await trio.run_process(
            tunnel_command("drain", "--wait", "t1", "--relay", relay.authority),
            check=False,
            capture_stdout=True,
            capture_stderr=True,
        )
    assert (done.returncode, done.stdout.startswith(b"draining t1")) == (status, True)


async def line_of(stream: trio.SocketStream) -> str:
    said = b""
    while not said.endswith(b"\n"):
        said += await stream.receive_some(1)
    return said.decode().strip()


async def test_closing_the_tunnel_meanwhile_gives_another_exit_status() -> None:
    async with relay_here() as relay:
        tunnel, _streams = await served(relay, 1)
        async with draining(relay, tunnel) as process:
            await line(process)
            async with control(relay.where) as client:
                await client.close(tunnel)
            assert await process.wait() == os.EX_TEMPFAIL
            assert process.stderr is not None
            said = (await process.stderr.receive_some()).decode()
            assert said == f"tunnel: tunnel {tunnel} closed before all visitors had left: closed by request\n"
