"""The queue of visitors that wait for a connection to the hidden server."""

from __future__ import annotations

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tunneld.backends.queue import WaitQueue


class Waiter:
    """A task that waits in the queue."""

    def __init__(self, queue: WaitQueue[str], nursery: trio.Nursery) -> None:
        self.item = ""
        self.was_closed = self.was_cancelled = False
        self.scope = trio.CancelScope()
        self._queue = queue
        nursery.start_soon(self._wait)

    async def _wait(self) -> None:
        with self.scope:
            try:
                self.item = await self._queue.wait()
            except trio.ClosedResourceError:
                self.was_closed = True
        self.was_cancelled = self.scope.cancelled_caught


@pytest.fixture
def queue() -> WaitQueue[str]:
    return WaitQueue()


async def three_waiters(queue: WaitQueue[str], nursery: trio.Nursery) -> list[Waiter]:
    """Three waiters, in this order."""
    waiters = []
    for _ in range(3):
        waiters.append(Waiter(queue, nursery))
        await wait_all_tasks_blocked()
    return waiters


async def test_the_first_waiter_is_served_first(queue: WaitQueue[str], nursery: trio.Nursery) -> None:
    waiters = await three_waiters(queue, nursery)
    for item in ("a", "b"):
        queue.serve(item)
    await wait_all_tasks_blocked()
    assert [one.item for one in waiters] == ["a", "b", ""]
    queue.serve("c")
    assert not queue.waiters


async def test_a_cancelled_waiter_is_skipped(queue: WaitQueue[str], nursery: trio.Nursery) -> None:
    waiters = await three_waiters(queue, nursery)
    waiters[1].scope.cancel()
    await wait_all_tasks_blocked()
    assert waiters[1].was_cancelled
    for item in ("a", "b"):
        queue.serve(item)
    await wait_all_tasks_blocked()
    assert [one.item for one in waiters] == ["a", "", "b"]


async def test_a_waiter_that_is_cancelled_after_it_was_served_keeps_its_item(
    queue: WaitQueue[str], nursery: trio.Nursery
) -> None:
    waiters = await three_waiters(queue, nursery)
    queue.serve("a")
    waiters[0].scope.cancel()
    await wait_all_tasks_blocked()
    assert (waiters[0].item, waiters[0].was_cancelled) == ("a", False)
    assert len(queue.waiters) == 2


async def test_an_item_served_right_after_a_cancellation_is_not_lost(
    queue: WaitQueue[str], nursery: trio.Nursery
) -> None:
    waiters = await three_waiters(queue, nursery)
    waiters[0].scope.cancel()
    queue.serve("a")
    await wait_all_tasks_blocked()
    assert [one.item for one in waiters] == ["", "a", ""]


async def test_close_wakes_all_waiters(queue: WaitQueue[str], nursery: trio.Nursery) -> None:
    waiters = await three_waiters(queue, nursery)
    queue.serve("a")
    queue.close()
    queue.close()
    await wait_all_tasks_blocked()
    assert waiters[0].item == "a"
    assert [one.was_closed for one in waiters] == [False, True, True]


async def test_a_task_that_waits_after_the_queue_was_closed_does_not_wait_for_ever() -> None:
    """A visitor that arrived just before its tunnel drained waits in a task that has not begun."""
    queue = WaitQueue[int]()
    queue.close()
    with pytest.raises(trio.ClosedResourceError):
        await queue.wait()
