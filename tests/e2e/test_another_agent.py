"""The independent agent config/examples/agent.py, written from tunneld-control(7) and the WebMUX draft.

It shares no code with tunneld, so what it can do, the manual says; what the manual left out, this test would show.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import trio

from tests.support.peers import PATIENCE, connect, is_dropped, read_all, read_exactly, reset
from tests.support.pki import Pki
from tests.support.programs import Daemon, daemon, program
from tunneld.net.endpoint import Endpoint
from tunneld.wire.verifier import derive

AGENT = Path(__file__).parents[2] / "config" / "examples" / "agent.py"
MIB = 1 << 20
SECRET = "s3cret, with = and ,"
BEAT = 0.4
"""Seconds between two heartbeats of the relay, shorter than by default."""


async def echo(stream: trio.SocketStream) -> None:
    """Send everything back, then the number of bytes."""
    count = 0
    with suppress(trio.BrokenResourceError):
        async for chunk in stream:
            count += len(chunk)
            await stream.send_all(chunk)
        await stream.send_all(b"%d" % count)
        await stream.send_eof()


async def serve(listener: trio.SocketListener, scope: trio.CancelScope) -> None:
    """Run the local server until cancelled."""
    with scope:
        async with listener:
            await trio.serve_listeners(echo, [listener])


@asynccontextmanager
async def served(folder: Path, *, secure: bool = False) -> AsyncIterator[tuple[Daemon, Endpoint, trio.CancelScope]]:
    """Run relay and agent. Yields the relay, the address for visitors, and the cancel scope of the local server."""
    pki = Pki.issue(folder / "pki") if secure else None
    words = '[[credential]]\nname = "me"\nrole = "user"\nverifier = "{}"\n'.format(
        derive(SECRET, b"a salt of 16 oct").reveal()
    )
    async with daemon(folder, pki=pki, words=words if secure else "") as relay, trio.open_nursery() as nursery:
        if not secure:
            config = folder / "tunnel.toml"
            config.write_text(
                config.read_text().replace("[webmux]", f"[webmux]\nheartbeat = {BEAT}\npatience = {BEAT}")
            )
            assert "key=webmux.heartbeat" in await relay.ask("reload")
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1", backlog=1000)
        local = trio.CancelScope()
        nursery.start_soon(serve, listener, local)
        port = listener.socket.getsockname()[1]
        command = [sys.executable, str(AGENT), relay.control.rpartition("/")[2], str(port)]
        if pki is not None:
            command += ["--ca", f"{pki.folder}/ca.pem", "--credential", "me"]
        environment = {**os.environ, "TUNNEL_SECRET": SECRET}
        async with program(command, stdout=subprocess.PIPE, env=environment) as agent:
            assert agent.stdout is not None
            line = b""
            with trio.fail_after(PATIENCE):
                while not line.endswith(b"\n"):
                    line += await agent.stdout.receive_some(1)
                address = Endpoint.parse(line.decode().strip())
            yield relay, address, local
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "in TLS, with a credential"])
async def test_it_serves_many_visitors_with_half_close_and_flow_control(tmp_path: Path, secure: bool) -> None:
    block = hashlib.sha256(b"block").digest() * (2 * MIB // 32)

    async def visit() -> None:
        async with await connect(address) as visitor:

            async def send() -> None:
                await visitor.send_all(block)
                await visitor.send_eof()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                assert await read_all(visitor) == block + b"%d" % len(block)

    async with served(tmp_path, secure=secure) as (_, address, _), trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(visit)


async def test_a_missing_server_and_an_aborted_visitor_are_resets(tmp_path: Path) -> None:
    async with served(tmp_path) as (relay, address, local), await connect(address) as visitor:
        await visitor.send_all(b"hello")
        assert await read_exactly(visitor, 5) == b"hello"
        reset(visitor)
        local.cancel()
        with trio.fail_after(PATIENCE):
            assert await is_dropped(await connect(address))
            while "visitors=0" not in await relay.ask("list"):
                pass


async def test_a_visitor_that_does_not_read_does_not_block_other_visitors(tmp_path: Path) -> None:
    async with served(tmp_path) as (_, address, _), await connect(address) as slow, trio.open_nursery() as nursery:
        nursery.start_soon(slow.send_all, bytes(64 * MIB))
        with trio.fail_after(PATIENCE):
            for _ in range(20):
                async with await connect(address) as visitor:
                    await visitor.send_all(b"hello")
                    await visitor.send_eof()
                    assert await read_all(visitor) == b"hello5"
        nursery.cancel_scope.cancel()


async def test_it_answers_heartbeats(tmp_path: Path) -> None:
    async with served(tmp_path) as (relay, address, _):
        await trio.sleep(6 * BEAT)  # time is what is tested here: a dead peer is given up after three beats
        assert not [line for line in relay.log if line["event"] == "carrier closed"]
        async with await connect(address) as visitor:
            await visitor.send_eof()
            with trio.fail_after(PATIENCE):
                assert await read_all(visitor) == b"0"


async def test_a_tunnel_closed_by_the_relay_is_opened_again_with_the_same_address(tmp_path: Path) -> None:
    async with served(tmp_path) as (relay, address, _):
        assert "OK closed t1" in await relay.ask("close t1")
        with trio.fail_after(PATIENCE):
            while "id=t2" not in await relay.ask("list"):
                pass
            async with await connect(address) as visitor:
                await visitor.send_all(b"again")
                await visitor.send_eof()
                assert await read_all(visitor) == b"again5"
