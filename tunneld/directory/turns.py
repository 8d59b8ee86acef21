"""Requests take turns: one step of one request per turn of Trio's scheduler, first come first served, and one step of
each owner at a time.

A step is a piece of work without a checkpoint: executing a request, formatting some items of its reply. However many
connections an owner has, and however many requests it sends ahead on each, visitors wait for one step at a time, and
another owner for one step of each owner.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from tunneld.directory.requester import Requester


class RequestTurns:
    """The queues of all owners. `len` is the number of owners with a step in progress or waiting."""

    def __init__(self) -> None:
        self._queues: dict[str, trio.StrictFIFOLock] = {}
        self._beginning = trio.StrictFIFOLock()  # of steps

    def __len__(self) -> int:
        return len(self._queues)

    @asynccontextmanager
    async def step(self, requester: Requester) -> AsyncIterator[None]:
        """Wait for the turn of this requester's owner, which lasts until the block ends."""
        grant = requester.grant
        owner = grant.name if grant is not None and grant.name else requester.host
        queue = self._queues.get(owner)
        if queue is None:
            self._queues[owner] = queue = trio.StrictFIFOLock()
            queue.acquire_nowait()
        else:
            await queue.acquire()
        try:
            if len(self._queues) > 1:
                async with self._beginning:
                    await trio.lowlevel.checkpoint()
            yield
            await trio.lowlevel.checkpoint()  # the next step begins in the next turn
        finally:
            queue.release()
            if not queue.locked():
                self._queues.pop(owner, None)
