"""Serving visitors inside a Trio program, through a tunnel."""

from __future__ import annotations

import subprocess
import sys

import pytest
import trio

import tunneld
from tests.agent.support import PATIENCE, relay_here
from tests.support.peers import connect, is_dropped, read_all
from tunneld.net.endpoint import Endpoint


async def test_the_example_runs() -> None:
    visitors: list[str] = []

    async def handler(stream: tunneld.VisitorStream) -> None:
        visitors.append(stream.visitor)
        async for chunk in stream:
            await stream.send_all(chunk)
        await stream.send_eof()

    with trio.fail_after(PATIENCE):
        async with (
            relay_here() as relay,
            tunneld.connect(relay.where) as client,
            tunneld.open_listener(client, name="echo") as listener,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(trio.serve_listeners, handler, [listener])
            stream = await connect(Endpoint.parse(listener.address))
            await stream.send_all(b"hello")
            await stream.send_eof()
            assert await read_all(stream) == b"hello"
            assert visitors == [f"127.0.0.1:{stream.socket.getsockname()[1]}"]
            assert [tunnel["name"] for tunnel in await client.list()] == ["echo"]
            nursery.cancel_scope.cancel()


async def test_the_tunnel_closes_with_the_block_and_accepted_streams_drop() -> None:
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay, tunneld.connect(relay.where) as client:
            async with tunneld.open_listener(client) as listener:
                visitor = await connect(Endpoint.parse(listener.address))
                accepted = await listener.accept()
            assert list(await client.list()) == []
            assert await is_dropped(visitor)
            await accepted.aclose()


async def test_accept_raises_that_the_tunnel_was_closed_after_the_queued_visitors() -> None:
    with trio.fail_after(PATIENCE):
        async with (
            relay_here() as relay,
            tunneld.connect(relay.where) as client,
            tunneld.open_listener(client) as listener,
        ):
            visitor = await connect(Endpoint.parse(listener.address))
            stream = await listener.accept()
            await visitor.send_all(b"x")
            assert await stream.receive_some(1) == b"x"
            await stream.aclose()
            await relay.service.close(relay.tunnel.id)
            with pytest.raises(tunneld.TunneldError, match=r"tunnel t\d+ was closed by request"):
                await listener.accept()


async def test_accept_after_aclose_raises_closed() -> None:
    with trio.fail_after(PATIENCE):
        async with (
            relay_here() as relay,
            tunneld.connect(relay.where) as client,
            tunneld.open_listener(client) as listener,
        ):
            await listener.aclose()
            with pytest.raises(trio.ClosedResourceError):
                await listener.accept()


async def test_visitors_beyond_the_backlog_wait_at_the_relay_and_none_is_lost() -> None:
    with trio.fail_after(PATIENCE):
        async with (
            relay_here() as relay,
            tunneld.connect(relay.where) as client,
            tunneld.open_listener(client, pool=2, max_pool=2, backlog=3) as listener,
        ):
            visitors = [await connect(Endpoint.parse(listener.address)) for _ in range(20)]
            while relay.tunnel.parked or not relay.tunnel.waiting:
                await trio.lowlevel.checkpoint()
            accepted = set()
            for _ in visitors:
                async with await listener.accept() as stream:
                    accepted.add(stream.visitor)
            assert accepted == {f"127.0.0.1:{visitor.socket.getsockname()[1]}" for visitor in visitors}


def test_importing_tunneld_loads_no_dependency_before_it_is_used() -> None:
    program = "import sys, tunneld; print(sorted({'trio', 'pydantic', 'ssl', 'structlog'} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=PATIENCE
    )
    assert result.stdout == "[]\n"


def test_every_public_name_exists_and_no_other() -> None:
    assert all(getattr(tunneld, name) is not None for name in tunneld.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Pool'"):
        tunneld.Pool  # noqa: B018
