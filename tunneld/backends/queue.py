"""The queue of visitors that wait for a connection to the hidden server, first in, first out."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

import trio

Item = TypeVar("Item")


class WaitQueue(Generic[Item]):
    """Tasks that wait for an item: a parked connection or a channel.

    No item is lost. A task that is cancelled leaves the queue at once, and a task that has been given an item returns
    it even if it is cancelled before it runs again.
    """

    def __init__(self) -> None:
        self.waiters = OrderedDict[_Waiter[Item], None]()  # oldest first; server sides only test whether it is empty
        self._closed = False

    async def wait(self) -> Item:
        """Wait until `serve` hands an item to this task, which then owns it. Raises `trio.ClosedResourceError` when
        the queue is closed first, or was before.
        """
        if self._closed:
            raise trio.ClosedResourceError
        waiter = _Waiter[Item]()
        self.waiters[waiter] = None

        def abort(_: object) -> trio.lowlevel.Abort:
            del self.waiters[waiter]
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)
        if waiter.item is None:
            raise trio.ClosedResourceError
        return waiter.item

    def serve(self, item: Item) -> None:
        """Give `item` to the task that has waited longest. The queue must not be empty."""
        waiter, _ = self.waiters.popitem(last=False)
        waiter.item = item
        trio.lowlevel.reschedule(waiter.task)

    def close(self) -> None:
        """Wake all waiting tasks with `trio.ClosedResourceError`. Idempotent."""
        self._closed = True
        while self.waiters:
            trio.lowlevel.reschedule(self.waiters.popitem(last=False)[0].task)


class _Waiter(Generic[Item]):
    """A waiting task, and the item it was given; None: the queue was closed."""

    __slots__ = ("item", "task")

    def __init__(self) -> None:
        self.task = trio.lowlevel.current_task()
        self.item: Item | None = None
