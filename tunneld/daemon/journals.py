"""What the relay writes down of its visitors and tunnels, in tasks that end after everything that they report.

journals
├─ records     of visitors that have left, see tunnel/records.py
└─ history     of events, see directory/event_history.py
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from tunneld.config.schema import Settings
from tunneld.directory.event_history import EventHistory
from tunneld.directory.service import TunnelService
from tunneld.tunnel.records import VisitorRecords


class Journals:
    """The journals of one relay."""

    def __init__(self, settings: Callable[[], Settings], state: Path | None, service: TunnelService) -> None:
        """`state` is the folder for the history; None: events are not kept."""
        self.records = VisitorRecords(lambda: settings().records)
        self.history = EventHistory(lambda: settings().events, state, service.events, service.live.name_of)
        self._events = service.events
        service.history, service.records = self.history, self.records

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Write until the block has ended, and then the rest."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self.history.run)
            await nursery.start(self.records.run)
            self.reconfigure()
            yield
            nursery.cancel_scope.cancel()

    def reconfigure(self) -> None:
        """The settings may have changed, and files may have been renamed."""
        self._events.recorder = self.records.recorder
        self.records.reopen()
        self.history.reconfigure()

    async def flush(self) -> None:
        """Write what there is: the process is about to become another one."""
        await self.records.flush()
        await self.history.flush()
