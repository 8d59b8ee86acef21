"""The engine of systems without epoll: the same contract, kept by Trio tasks.

run
├─ listening ×N            accepts, hands over, and so on
├─ watching ×N             sleeps until its connection stirs, tells once
└─ joined ×N               waits for its sockets to be connected, then copies both ways

The tasks of the portable engine: one for a listener, a watched connection, a relay.

Each has a cancel scope; releasing or dropping cancels it. Callbacks run in these tasks, all of them the engine's own.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from typing import Any, cast

import structlog
import trio

from tunneld.engine.copy import StreamCopier
from tunneld.engine.engine import Cause, FailureCallback, Limiter, Registration, Relay, RelayEnd, Side
from tunneld.engine.failures import OUR_FAULTS, log_shortage, reset_on_close, tell_failure
from tunneld.engine.handover import RelayState
from tunneld.engine.limits import EngineLimits
from tunneld.engine.throttle import PatientThrottle
from tunneld.errors import SHORTAGES


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


log = structlog.get_logger("relay")


class EngineTask:
    """A task that stands for a socket of somebody else."""

    def __init__(self) -> None:
        self._scope = trio.CancelScope()

    def release(self) -> None:
        """See `Registration.release`."""
        self._scope.cancel()

    @property
    def released(self) -> bool:
        """Whether no callback may come any more."""
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
        """Accept until released."""
        short = False
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
                    if error.errno in OUR_FAULTS:
                        tell_failure(self._on_failure, error)
                        return
                    if error.errno in SHORTAGES:
                        if not short:
                            log_shortage(error)
                        short = True
                        await trio.sleep(self._limits.accept_backoff)
                    continue
                short = False
                self._hand_over(connection, address)

    def _hand_over(self, connection: socket.socket, address: Any) -> None:
        """Give the connection to the owner, or its bug to whom it concerns."""
        connection.setblocking(False)
        try:
            self._on_connection(connection, address)
        except Exception as error:
            connection.close()
            tell_failure(self._on_failure, error)


class WatchTask(EngineTask):
    """See `Engine.watch`. It tells once: a second time would spin, for the bytes still stand there."""

    def __init__(self, connection: socket.socket, on_event: Callable[[], None], on_failure: FailureCallback) -> None:
        super().__init__()
        self._connection = connection
        self._on_event = on_event
        self._on_failure = on_failure

    async def run(self) -> None:
        """Sleep until something is there to be read, an end and an error included."""
        with self._scope:
            if self.released:
                return  # before it began: the connection may have the next owner already
            try:
                await trio.lowlevel.wait_readable(self._connection)
            except (trio.ClosedResourceError, OSError, ValueError):
                return  # the owner closed it
            try:
                self._on_event()
            except Exception as error:
                tell_failure(self._on_failure, error)


class TaskRelay:
    """Two sockets joined by two tasks: the `Relay` its owner holds."""

    def __init__(
        self,
        visitor: socket.socket,
        server: socket.socket,
        linger: float,
        on_end: Callable[[Relay, RelayEnd], None],
        throttle: PatientThrottle | None = None,
    ) -> None:
        self._sockets = {Side.VISITOR: visitor, Side.SERVER: server}
        self._linger = linger
        self._throttle = throttle
        self._on_end = on_end
        self._scope = trio.CancelScope()
        self._copying: StreamCopier | None = None

    @property
    def up(self) -> int:
        """Bytes delivered from the visitor to the server."""
        return self._copying.up if self._copying is not None else 0

    @property
    def down(self) -> int:
        """Bytes delivered from the server to the visitor."""
        return self._copying.down if self._copying is not None else 0

    def drop(self) -> None:
        """See `Relay.drop`."""
        self._scope.cancel()
        for side in self._sockets.values():
            if side.fileno() != -1:
                trio.lowlevel.notify_closing(side)
                side.close()

    async def run(self) -> None:
        """Relay, and tell the owner how it ended, in any case."""
        end = RelayEnd(Cause.DROPPED)
        try:
            with self._scope:
                end = await self._connect() or await self._relay()
        except Exception as error:
            log.exception("relay failed", exc_info=error)
        finally:
            if self._scope.cancel_called:
                end = RelayEnd(Cause.DROPPED)
            for side in self._sockets.values():
                side.close()
            self._tell(end)

    async def _connect(self) -> RelayEnd | None:
        """Wait until both sockets are connected; how it ended if one is not to be."""
        for side, connection in self._sockets.items():
            try:
                await wait_connected(connection)
            except OSError as error:
                for both in self._sockets.values():
                    reset_on_close(both)
                return RelayEnd(Cause.RESET, side, error)
        return None

    async def _relay(self) -> RelayEnd:
        visitor, server = (
            trio.SocketStream(trio.socket.from_stdlib_socket(connection)) for connection in self._sockets.values()
        )
        self._copying = StreamCopier(visitor, server, linger=self._linger, throttle=self._throttle)
        return await self._copying.run()

    def _tell(self, end: RelayEnd) -> None:
        try:
            self._on_end(self, end)
        except Exception as error:
            log.exception("could not tell the end of a relay", exc_info=error)


async def wait_connected(connection: socket.socket) -> None:
    """Wait for a socket that may still be connecting. Raises OSError where that fails."""
    try:
        connection.getpeername()
    except OSError as error:
        if error.errno != errno.ENOTCONN:
            raise
    else:
        return
    await trio.lowlevel.wait_writable(connection)
    number = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if number:
        raise OSError(number, os.strerror(number))
