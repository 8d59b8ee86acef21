"""Scripted relays, and clients of control servers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial

import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.support.control import Server
from tests.support.peers import PATIENCE
from tunneld.client import Client, connect
from tunneld.net.endpoint import Endpoint

LONG = 1e6
GREETING = b"OK tunneld 9.9 protocol=1 auth=none\n"


Serve = Callable[[trio.SocketStream], Awaitable[None]]


@asynccontextmanager
async def fake_relay(serve: Serve, patience: float = PATIENCE) -> AsyncIterator[Endpoint]:
    """Run a TCP server with this handler."""
    with trio.fail_after(patience):
        async with trio.open_nursery() as nursery:
            (listener,) = await nursery.start(partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
            yield Endpoint("tcp", "127.0.0.1", listener.socket.getsockname()[1])
            nursery.cancel_scope.cancel()


def saying(*lines: bytes, then: Serve | None = None) -> Serve:
    """Make a handler that sends these lines, and then closes the connection or calls `then`."""

    async def serve(stream: trio.SocketStream) -> None:
        await stream.send_all(b"".join(lines))
        if then:
            await then(stream)

    return serve


async def stay(_: trio.SocketStream) -> None:
    await trio.sleep_forever()


@asynccontextmanager
async def client_of(server: Server) -> AsyncIterator[Client]:
    async with connect(str(server.endpoint)) as client:
        yield client


async def jump_when_idle(clock: MockClock, seconds: float) -> None:
    await wait_all_tasks_blocked(0.01)
    clock.jump(seconds)
