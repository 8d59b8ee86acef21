"""What asyncssh relies on in the asyncio loop on Trio, with a virtual clock."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import trio
import trio.testing

from tests.backends.ssh.client_loop import run_asyncio
from tunneld.backends.ssh.loop import TrioEventLoop, start_loop

Failures = list[dict[str, Any]]


@pytest.fixture
def failures() -> Failures:
    """The contexts that the exception handler received."""
    return []


@pytest.fixture
async def loop(nursery: trio.Nursery, failures: Failures) -> TrioEventLoop:
    """A running loop."""
    return await start_loop(nursery, lambda _loop, context: failures.append(context))


async def test_callbacks_run_in_order_and_never_inside_the_caller(loop: TrioEventLoop) -> None:
    seen: list[int] = []
    for number in range(3):
        loop.call_soon(seen.append, number)
    assert seen == []
    await trio.testing.wait_all_tasks_blocked()
    assert seen == [0, 1, 2]


async def test_timers_run_in_the_order_of_their_times(loop: TrioEventLoop, autojump_clock: object) -> None:
    seen: list[tuple[str, float]] = []
    start = loop.time()

    def note(name: str) -> None:
        seen.append((name, loop.time() - start))

    for name, delay in (("late", 2.0), ("early", 1.0), ("cancelled", 0.5), ("also late", 2.0)):
        handle = loop.call_later(delay, note, name)
        if name == "cancelled":
            handle.cancel()
    await trio.sleep(3)
    assert seen == [("early", 1.0), ("late", 2.0), ("also late", 2.0)]


async def test_cancelled_timers_do_not_pile_up(loop: TrioEventLoop) -> None:
    for _ in range(1000):
        loop.call_later(3600, print).cancel()
    assert len(loop._timers) <= 1


async def test_a_coroutine_can_use_tasks_events_and_timeouts(loop: TrioEventLoop, autojump_clock: object) -> None:
    async def work() -> str:
        event = asyncio.Event()
        asyncio.get_running_loop().call_later(1, event.set)
        await asyncio.wait_for(event.wait(), 2)
        task = asyncio.ensure_future(asyncio.sleep(1, "done"))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.Event().wait(), 0.5)
        return await task

    assert await run_asyncio(loop, work()) == "done"


async def test_trio_code_never_sees_a_running_loop(loop: TrioEventLoop) -> None:
    async def work() -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    assert await run_asyncio(loop, work()) is loop
    with pytest.raises(RuntimeError):
        asyncio.get_running_loop()


async def test_the_result_and_the_exception_of_a_trio_function_arrive(loop: TrioEventLoop) -> None:
    async def add(one: int, two: int) -> int:
        await trio.lowlevel.checkpoint()
        if not two:
            raise ValueError("nothing to add")
        return one + two

    async def work() -> int:
        with pytest.raises(ValueError, match="nothing to add"):
            await loop.trio_as_future(add, 1, 0)
        return await loop.trio_as_future(add, 1, 2)

    assert await run_asyncio(loop, work()) == 3


async def test_cancelling_the_future_cancels_the_trio_function(loop: TrioEventLoop) -> None:
    cancelled = trio.Event()

    async def wait() -> None:
        try:
            await trio.sleep_forever()
        finally:
            cancelled.set()

    future = loop.trio_as_future(wait)
    await trio.testing.wait_all_tasks_blocked()
    future.cancel()
    await cancelled.wait()


async def test_a_function_runs_in_a_thread(loop: TrioEventLoop) -> None:
    async def work() -> int:
        return await loop.run_in_executor(None, sum, [1, 2])

    assert await run_asyncio(loop, work()) == 3


async def test_an_exception_of_a_callback_reaches_the_handler_and_the_loop_goes_on(
    loop: TrioEventLoop, failures: Failures
) -> None:
    def fail() -> None:
        raise ValueError("a bug")

    seen: list[int] = []
    loop.call_soon(fail)
    loop.call_soon(seen.append, 1)
    await trio.testing.wait_all_tasks_blocked()
    assert [str(context["exception"]) for context in failures] == ["a bug"]
    assert seen == [1]


async def test_a_busy_loop_leaves_time_to_trio(loop: TrioEventLoop) -> None:
    count = 0

    def again() -> None:
        nonlocal count
        count += 1
        loop.call_soon(again)

    loop.call_soon(again)
    for _ in range(100):
        await trio.lowlevel.checkpoint()
    assert 10 < count < 1000


async def test_tasks_are_cancelled_when_the_loop_ends() -> None:
    ended: list[str] = []

    async def work() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            await asyncio.sleep(0)
            ended.append("task")

    async with trio.open_nursery() as nursery:
        loop = await start_loop(nursery, lambda _loop, _context: None)
        loop.create_task(work())
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert ended == ["task"]
    assert loop.is_closed()
