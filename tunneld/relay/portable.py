"""The engine of systems without epoll: the same contract, kept by Trio tasks.

run
├─ listening ×N            accepts, hands over, and so on
├─ watching ×N             sleeps until its connection stirs, tells once
└─ joined ×N               waits for its sockets to be connected, then copies both ways
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any, cast

import trio

from .engine import FailureCallback, Limiter, Registration, Relay, RelayEnd
from .lift import RelayState
from .limits import EngineLimits
from .tasks import AcceptTask, TaskRelay, WatchTask
from .throttle import PatientThrottle


class PortableEngine:
    """Trio tasks in one nursery. See `Engine` for the contract."""

    def __init__(self, limits: EngineLimits) -> None:
        """Nothing happens before `run`."""
        self._limits = limits
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """See `Engine.run`."""
        try:
            async with trio.open_nursery() as self._nursery:
                task_status.started()
                await trio.sleep_forever()
        finally:
            self._nursery = None

    def listen(
        self, listener: socket.socket, on_connection: Callable[[socket.socket, Any], None], on_failure: FailureCallback
    ) -> Registration:
        """See `Engine.listen`."""
        listening = AcceptTask(listener, on_connection, on_failure, self._limits)
        self._running().start_soon(listening.run)
        return listening

    def watch(
        self, connection: socket.socket, on_event: Callable[[], None], on_failure: FailureCallback
    ) -> Registration:
        """See `Engine.watch`."""
        watching = WatchTask(connection, on_event, on_failure)
        self._running().start_soon(watching.run)
        return watching

    def join(
        self,
        visitor: socket.socket,
        server: socket.socket,
        *,
        linger: float,
        on_end: Callable[[Relay, RelayEnd], None],
        throttle: Limiter | None = None,
    ) -> Relay:
        """See `Engine.join`."""
        joined = TaskRelay(visitor, server, linger, on_end, cast("PatientThrottle | None", throttle))
        self._running().start_soon(joined.run)
        return joined

    def export_relay(self, relay: Relay) -> RelayState | None:
        """See `Engine.lift`: what is on its way is in the tasks."""
        return None

    def import_relay(
        self, lifted: RelayState, *, on_end: Callable[[Relay, RelayEnd], None], throttle: Limiter | None = None
    ) -> Relay:
        """See `Engine.put_down`: nothing was lifted, so nothing comes."""
        raise NotImplementedError

    def limit(self, rate: float | None, quota: int | None, on_used_up: Callable[[], None]) -> Limiter:
        """See `Engine.limit`."""
        return PatientThrottle(rate, quota, on_used_up)

    def _running(self) -> trio.Nursery:
        """The nursery. Raises RuntimeError outside `run`."""
        if self._nursery is None:
            raise RuntimeError("engine cannot take sockets: it is not running")
        return self._nursery
