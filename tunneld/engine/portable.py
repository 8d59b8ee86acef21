"""The engine of systems without epoll: the same contract, kept by Trio tasks.

    run
    ├─ AcceptTask ×N     accepts from one listener
    ├─ WatchTask ×N      waits for the first event of one parked connection
    ├─ StreamEnd ×N      serves one side of a relay, see `stream_end`
    └─ timers            linger times, and `on_end` of ended relays

Relays, flows and ends are the same as in the pump; every socket is a stream here. Callbacks run in these tasks.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any, cast

import trio

from tunneld.engine.end import End
from tunneld.engine.engine import FailureCallback, Limiter, Registration, Relay, RelayEnd
from tunneld.engine.failures import log_shortage, report_failure
from tunneld.engine.handover import RelayState
from tunneld.engine.limits import EngineLimits
from tunneld.engine.relay import JoinedEnds
from tunneld.engine.scheduler import Scheduler
from tunneld.engine.stream_end import StreamEnd
from tunneld.engine.throttle import Throttle, TokenBucket
from tunneld.errors import SHORTAGES
from tunneld.net.accept import NOT_LISTENING, AcceptShortage, unmap_address


class PortableEngine(Scheduler):
    """Trio tasks in one nursery. See `Engine` for the contract."""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """See `Engine.run`."""
        try:
            async with trio.open_nursery() as self._nursery:
                self._nursery.start_soon(self.timers.run)
                task_status.started()
                await trio.sleep_forever()
        finally:
            self._nursery = None
            self.drop_relays()

    def listen(
        self, listener: socket.socket, on_connection: Callable[[socket.socket, Any], None], on_failure: FailureCallback
    ) -> Registration:
        """See `Engine.listen`."""
        task = AcceptTask(listener, on_connection, on_failure, self.limits)
        self.start_task(task.run)
        return task

    def watch(
        self, connection: socket.socket, on_event: Callable[[], None], on_failure: FailureCallback
    ) -> Registration:
        """See `Engine.watch`."""
        task = WatchTask(connection, on_event, on_failure)
        self.start_task(task.run)
        return task

    def join(
        self,
        visitor: socket.socket | End,
        server: socket.socket | End,
        *,
        linger: float,
        on_end: Callable[[Relay, RelayEnd], None],
        throttle: Limiter | None = None,
        early: bytes = b"",
    ) -> Relay:
        """See `Engine.join`."""
        ends = [end if isinstance(end, End) else self._end_of(end) for end in (visitor, server)]
        relay = JoinedEnds(self, ends[0], ends[1], linger, on_end, cast("Throttle | None", throttle))
        relay.start(early)
        return relay

    def _end_of(self, connection: socket.socket) -> StreamEnd:
        return StreamEnd(self, trio.SocketStream(trio.socket.from_stdlib_socket(connection)))

    def export_relay(self, relay: Relay) -> RelayState | None:
        """See `Engine.export_relay`. Not possible here: undelivered bytes are in the tasks."""
        return None

    def import_relay(
        self, state: RelayState, *, on_end: Callable[[Relay, RelayEnd], None], throttle: Limiter | None = None
    ) -> Relay:
        """Not possible: this engine exports nothing."""
        raise NotImplementedError

    def limit(
        self,
        rate: float | None,
        quota: int | None,
        on_used_up: Callable[[], None],
        shared: TokenBucket | None = None,
    ) -> Limiter:
        """See `Engine.limit`."""
        return Throttle(rate, quota, self.timers, on_used_up, shared)


class EngineTask:
    """A task that serves a socket which the caller owns."""

    def __init__(self) -> None:
        self._scope = trio.CancelScope()

    def release(self) -> None:
        """See `Registration.release`."""
        self._scope.cancel()

    @property
    def released(self) -> bool:
        """Whether callbacks must no longer be called."""
        return self._scope.cancel_called


class AcceptTask(EngineTask):
    """See `Engine.listen`."""

    def __init__(
        self,
        listener: socket.socket,
        on_connection: Callable[[socket.socket, Any], None],
        on_failure: FailureCallback,
        limits: EngineLimits,
    ) -> None:
        super().__init__()
        self._listener = listener
        self._on_connection = on_connection
        self._on_failure = on_failure
        self._limits = limits

    async def run(self) -> None:
        """Accept until released, or until the socket stops listening."""
        shortage = AcceptShortage(log_shortage)
        with self._scope:
            while not self.released:
                try:
                    await trio.lowlevel.wait_readable(self._listener)
                    connection, address = self._listener.accept()
                except BlockingIOError:
                    continue
                except trio.ClosedResourceError:
                    return
                except OSError as error:
                    if error.errno in NOT_LISTENING:
                        report_failure(self._on_failure, error)
                        return
                    if error.errno in SHORTAGES:
                        shortage.begin(error)
                        await trio.sleep(self._limits.accept_backoff)
                    continue
                shortage.end()
                self._hand_over(connection, unmap_address(address))

    def _hand_over(self, connection: socket.socket, address: Any) -> None:
        """Call `on_connection`. If it raises, close the connection and report the failure."""
        connection.setblocking(False)
        try:
            self._on_connection(connection, address)
        except Exception as error:
            connection.close()
            report_failure(self._on_failure, error)


class WatchTask(EngineTask):
    """See `Engine.watch`. It reports one event: a second wait would spin, since the bytes are still unread."""

    def __init__(self, connection: socket.socket, on_event: Callable[[], None], on_failure: FailureCallback) -> None:
        super().__init__()
        self._connection = connection
        self._on_event = on_event
        self._on_failure = on_failure

    async def run(self) -> None:
        """Wait until a read would return bytes, an end of file or an error; then call `on_event`."""
        with self._scope:
            if self.released:
                return  # released before it began: the connection may have another owner already
            try:
                await trio.lowlevel.wait_readable(self._connection)
            except (trio.ClosedResourceError, OSError, ValueError):
                return  # the owner closed it
            try:
                self._on_event()
            except Exception as error:
                report_failure(self._on_failure, error)
