"""The engine of systems without epoll: the same contract, kept by Trio tasks.

    run
    ├─ AcceptTask ×N     accepts from one listener
    ├─ WatchTask ×N      waits for the first event of one parked connection
    └─ TaskRelay ×N      waits until its sockets are connected, then copies both ways

Each task has a cancel scope; releasing or dropping cancels it. Callbacks run in these tasks.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from typing import Any, cast

import structlog
import trio

from tunneld.engine.copy import StreamCopier
from tunneld.engine.engine import Cause, FailureCallback, Limiter, Registration, Relay, RelayEnd, Side
from tunneld.engine.failures import log_shortage, report_failure, reset_on_close
from tunneld.engine.handover import RelayState
from tunneld.engine.limits import EngineLimits
from tunneld.engine.throttle import TaskThrottle, TokenBucket
from tunneld.errors import SHORTAGES
from tunneld.net.accept import NOT_LISTENING, AcceptShortage, unmap_address
from tunneld.net.sockets import pending_error

log = structlog.get_logger("engine")


class PortableEngine:
    """Trio tasks in one nursery. See `Engine` for the contract."""

    def __init__(self, limits: EngineLimits) -> None:
        """Starts nothing; `run` does."""
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
        task = AcceptTask(listener, on_connection, on_failure, self._limits)
        self._tasks().start_soon(task.run)
        return task

    def watch(
        self, connection: socket.socket, on_event: Callable[[], None], on_failure: FailureCallback
    ) -> Registration:
        """See `Engine.watch`."""
        task = WatchTask(connection, on_event, on_failure)
        self._tasks().start_soon(task.run)
        return task

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
        relay = TaskRelay(visitor, server, linger, on_end, cast("TaskThrottle | None", throttle))
        self._tasks().start_soon(relay.run)
        return relay

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
        return TaskThrottle(rate, quota, on_used_up, shared)

    def _tasks(self) -> trio.Nursery:
        """The nursery. Raises RuntimeError outside `run`."""
        if self._nursery is None:
            raise RuntimeError("the engine is not running")
        return self._nursery


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


class TaskRelay:
    """Two sockets joined by two tasks; the `Relay` that the owner holds."""

    def __init__(
        self,
        visitor: socket.socket,
        server: socket.socket,
        linger: float,
        on_end: Callable[[Relay, RelayEnd], None],
        throttle: TaskThrottle | None = None,
    ) -> None:
        self._sockets = {Side.VISITOR: visitor, Side.SERVER: server}
        self._linger = linger
        self._throttle = throttle
        self._on_end = on_end
        self._scope = trio.CancelScope()
        self._copier: StreamCopier | None = None

    @property
    def up(self) -> int:
        """Bytes delivered from the visitor to the server."""
        return self._copier.up if self._copier is not None else 0

    @property
    def down(self) -> int:
        """Bytes delivered from the server to the visitor."""
        return self._copier.down if self._copier is not None else 0

    def drop(self) -> None:
        """See `Relay.drop`."""
        self._scope.cancel()
        for connection in self._sockets.values():
            if connection.fileno() != -1:
                trio.lowlevel.notify_closing(connection)
        self._close(is_cut=True)

    async def run(self) -> None:
        """Relay, then close both sockets and call `on_end`, whatever happens."""
        end = RelayEnd(Cause.DROPPED)
        try:
            with self._scope:
                end = await self._connect() or await self._relay()
        except Exception as error:
            log.exception("relay failed: internal error", exc_info=error)
        finally:
            if self._scope.cancel_called:
                end = RelayEnd(Cause.DROPPED)
            self._close(is_cut=end.cause is not Cause.FINISHED)
            self._notify_ended(end)

    def _close(self, *, is_cut: bool) -> None:
        """Close both sockets, with a reset where one was not told the end of the other."""
        told_end = self._copier.told_end if self._copier is not None else set()
        for side, connection in self._sockets.items():
            if is_cut and side not in told_end and connection.fileno() != -1:
                reset_on_close(connection)
            connection.close()

    async def _connect(self) -> RelayEnd | None:
        """Wait until both sockets are connected. Return how the relay ended if one cannot connect."""
        for side, connection in self._sockets.items():
            try:
                await wait_connected(connection)
            except OSError as error:
                for each in self._sockets.values():
                    reset_on_close(each)
                return RelayEnd(Cause.RESET, side, error)
        return None

    async def _relay(self) -> RelayEnd:
        visitor, server = (
            trio.SocketStream(trio.socket.from_stdlib_socket(connection)) for connection in self._sockets.values()
        )
        self._copier = StreamCopier(visitor, server, linger=self._linger, throttle=self._throttle)
        return await self._copier.run()

    def _notify_ended(self, end: RelayEnd) -> None:
        try:
            self._on_end(self, end)
        except Exception as error:
            log.exception("on_end callback failed: internal error", exc_info=error)


async def wait_connected(connection: socket.socket) -> None:
    """Wait for a socket that may still be connecting. Raises OSError if it cannot connect."""
    try:
        connection.getpeername()
    except OSError as error:
        if error.errno != errno.ENOTCONN:
            raise
    else:
        return
    await trio.lowlevel.wait_writable(connection)
    failure = pending_error(connection)
    if failure is not None:
        raise failure
