"""The line in which visitors wait for a way to the hidden server, first come, first served."""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

import trio

Item = TypeVar("Item")


class WaitQueue(Generic[Item]):
    """Those who wait for ways of one kind. No way is lost: who is cancelled is out of the line in that moment, and who
    was served before it is not cancelled any more.
    """

    def __init__(self) -> None:
        self.waiters: deque[_Waiter[Item]] = deque()  # the first in front; others only ask whether there are any

    async def wait(self) -> Item:
        """Stand in line until served. Raises `trio.ClosedResourceError` where it is sent away."""
        waiter = _Waiter[Item]()
        self.waiters.append(waiter)

        def leave(_: object) -> trio.lowlevel.Abort:
            self.waiters.remove(waiter)
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(leave)
        if waiter.way is None:
            raise trio.ClosedResourceError
        return waiter.way

    def serve(self, way: Item) -> None:
        """The first in line has this one; there must be somebody."""
        waiter = self.waiters.popleft()
        waiter.way = way
        trio.lowlevel.reschedule(waiter.task)

    def close(self) -> None:
        """Send everybody away."""
        while self.waiters:
            trio.lowlevel.reschedule(self.waiters.popleft().task)


class _Waiter(Generic[Item]):
    """Somebody in line."""

    __slots__ = ("task", "way")

    def __init__(self) -> None:
        self.task = trio.lowlevel.current_task()
        self.way: Item | None = None
