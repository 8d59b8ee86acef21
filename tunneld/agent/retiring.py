"""What the sources have in common whose visitors share connections: they take no more visitors part by part.

A *part* is the tunnel's place on one connection: its offer on a carrier, or its association. It is retired when no more
visitors are wanted there, confirmed once the relay knows that, and over once its last visitor has left.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import trio


class SourcePart(Protocol):
    """The tunnel's place on one connection."""

    @property
    def confirmed(self) -> bool:
        """Whether the relay knows that it is retired."""

    @property
    def over(self) -> bool:
        """Whether there is nothing left of it."""

    def retire(self) -> None:
        """Ask the relay for no more visitors. Harmless when repeated."""


class RetiringSource:
    """The part of a `ConnectionSource` that ends it. A subclass has the parts, and calls `notify_changed`."""

    size = 0

    def __init__(self) -> None:
        self.closed = False  # no new visitors; each part ends with its last one
        self.paused = True  # no new connections
        self._changed = trio.Event()

    @property
    def parts(self) -> Iterable[SourcePart]:
        """All parts."""
        raise NotImplementedError

    def pause(self) -> None:
        """See `ConnectionSource.pause`: visitors still come on the existing connections."""
        self.paused = True

    def resize(self) -> bool:
        """Return False: no connection is parked at the relay."""
        return False

    def close(self) -> None:
        """Take no new visitors: each part ends with the last visitor on it."""
        self.closed = self.paused = True
        for part in list(self.parts):
            part.retire()

    def withdraw(self) -> None:
        """See `ConnectionSource.withdraw`."""
        self.close()

    async def wait_withdrawn(self) -> None:
        """See `ConnectionSource.wait_withdrawn`."""
        while not all(part.confirmed or part.over for part in self.parts):
            await self._changed.wait()

    async def wait_closed(self) -> None:
        """See `ConnectionSource.wait_closed`."""
        while any(True for _ in self.parts):
            await self._changed.wait()

    def notify_changed(self) -> None:
        """A part ended, or the relay confirmed that it is to end: wake the waiting tasks."""
        self._changed.set()
        self._changed = trio.Event()
