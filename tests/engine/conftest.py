"""Fixtures of the engine tests."""

from __future__ import annotations

import gc
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
import trio

from tests.engine.bench import ENGINES, Bench, open_descriptors
from tunneld.engine import new_engine
from tunneld.engine.engine import Engine

TEST_TIMEOUT = 60
"Seconds after which a test fails; virtual seconds count, too."


@pytest.fixture
def no_leak() -> Iterator[None]:
    """The test closes every descriptor that it opens."""
    before = open_descriptors()
    yield
    if open_descriptors() != before:
        gc.collect()  # an exception may have kept an object alive
    assert open_descriptors() == before


@asynccontextmanager
async def running(engine: Engine) -> AsyncIterator[Bench]:
    """A running engine; the test has a time limit."""

    async def guard() -> None:
        with trio.fail_after(TEST_TIMEOUT):
            await trio.sleep_forever()

    async def serve(task_status: trio.TaskStatus[trio.CancelScope]) -> None:
        with trio.CancelScope() as stop:
            async with trio.open_nursery() as inner:
                await inner.start(engine.run)
                task_status.started(stop)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(guard)
        bench = Bench(engine, nursery, await nursery.start(serve))
        yield bench
        nursery.cancel_scope.cancel()
    for connection in bench.sockets:
        connection.close()


@pytest.fixture(params=ENGINES)
async def bench(request: pytest.FixtureRequest, no_leak: None) -> AsyncIterator[Bench]:
    """Each engine in turn."""
    name: str = request.param
    async with running(ENGINES[name]()) as bench:
        yield bench


@pytest.fixture
async def pump(request: pytest.FixtureRequest, no_leak: None) -> AsyncIterator[Bench]:
    """The Linux engine, with the limits of an indirect parametrisation."""
    if sys.platform != "linux":
        pytest.skip("the pump needs epoll and splice")
    async with running(new_engine(**getattr(request, "param", {}))) as bench:
        yield bench
