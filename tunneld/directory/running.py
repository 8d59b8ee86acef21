"""Runs the open tunnels, and removes each from the directory when it has closed.

tunnels                    isolation boundary: an exception closes its tunnel and is logged once
├─ meter                   stores at intervals how much of its quota each name has used
└─ tunnel ×N               see tunnel/tunnel.py
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import trio

from tunneld.directory.live import LiveTunnels
from tunneld.directory.local import LocalDirectory
from tunneld.directory.opening import announce
from tunneld.errors import ExpiredError
from tunneld.tunnel.events import Events
from tunneld.tunnel.tunnel import Tunnel
from tunneld.tunnel.visitors import STOPPED

METER_INTERVAL = 10.0
"""Seconds from one time that the used quota of open tunnels is stored to the next: what a kill -9 forgets of it. One
transaction then has all tunnels that relayed bytes.
"""
METER_AT_ONCE = 200
"""Tunnels that are looked at without a break."""


class TunnelRunner:
    """The tasks of the tunnels of this process."""

    def __init__(
        self, live: LiveTunnels, events: Events, directory: LocalDirectory, is_draining: Callable[[], bool]
    ) -> None:
        """`is_draining` returns whether the process is about to end: reservations stay as they are then."""
        self._live = live
        self._events = events
        self._directory = directory
        self._is_draining = is_draining
        self._released_on_close: set[str] = set()  # ids of tunnels that lose their reservation when they close
        self._metered: dict[str, Tunnel] = {}  # by id: with a name and a quota
        self._has_metered = trio.Event()
        self._nursery: trio.Nursery

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the tunnels until cancelled, which drops them all."""
        async with trio.open_nursery() as self._nursery:
            self._nursery.start_soon(self._meter)
            task_status.started()
            await trio.sleep_forever()

    async def start(self, tunnel: Tunnel, replaced: Tunnel | None = None, *, is_new: bool = True) -> None:
        """Run a tunnel that is in the directory; this returns when it serves. One that is new is announced, and waits
        until the one that it replaces has closed.
        """
        await self._nursery.start(partial(self._run, tunnel, replaced, is_new=is_new))

    def meter(self, tunnel: Tunnel) -> None:
        """Store what a tunnel uses of its quota from now on, if it has a name and a quota."""
        if tunnel.limits.quota is not None and self._live.record_of(tunnel.id).holder is not None:
            self._metered[tunnel.id] = tunnel
            self._has_metered.set()

    def release_on_close(self, tunnel: Tunnel) -> None:
        """The tunnel is about to close, and its reservation ends with it."""
        self._released_on_close.add(tunnel.id)

    async def _run(
        self,
        tunnel: Tunnel,
        replaced: Tunnel | None,
        *,
        is_new: bool,
        task_status: trio.TaskStatus[None],
    ) -> None:
        """Run one tunnel until it closes, once the one that it replaces has closed. Meanwhile visitors wait in the
        queues of the listeners that both share. A bug closes this tunnel, never the daemon.
        """
        try:
            if replaced is not None:
                await replaced.wait_closed()
            if tunnel.is_closing:  # replaced by a third one, or exported, before it began
                task_status.started()
                return
            if is_new:
                announce(self._events, tunnel, self._live.record_of(tunnel.id))
            self.meter(tunnel)
            await tunnel.run(task_status=task_status)
        except Exception as error:
            tunnel.fail(error)
        finally:
            await self._remove(tunnel)

    async def _remove(self, tunnel: Tunnel) -> None:
        """Remove a tunnel that has closed, or has not begun. A directory that waits here would have to be shielded."""
        tunnel.discard()
        self._metered.pop(tunnel.id, None)
        record = replace(self._live.remove(tunnel), metered=tunnel.metered)
        await self._directory.remove(record, keep=self._keeps_reservation(tunnel))
        if tunnel.expired:
            error = ExpiredError(f"tunnel {record.id} has ended: {tunnel.reason}")
            await self._directory.note_end(record.server, record.owner, error)

    async def _meter(self) -> None:
        """Tell the directory at intervals how much the open tunnels have used of their quota. A tunnel that closes
        tells it by itself.
        """
        while True:
            if not self._metered:
                self._has_metered = trio.Event()
                await self._has_metered.wait()
            await trio.sleep(METER_INTERVAL)
            for number, tunnel in enumerate(list(self._metered.values())):
                if tunnel.id in self._metered:
                    await self._directory.meter(self._live.record_of(tunnel.id), tunnel.metered)
                if not number % METER_AT_ONCE:
                    await trio.lowlevel.checkpoint()

    def _keeps_reservation(self, tunnel: Tunnel) -> bool | None:
        """See `Directory.remove`."""
        if tunnel.id in self._released_on_close:
            self._released_on_close.discard(tunnel.id)
            return False
        return None if self._is_draining() or tunnel.reason == STOPPED else True
