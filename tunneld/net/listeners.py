"""The listening sockets of one service (control, http, webmux, ssh), which a reload can replace while it serves.

    ReloadableListener.serve
    └─ accept loop × listener    never waits for a peer; ends with its listener, while accepted connections go on

A service whose connections the engine serves lets the engine accept them, too: no task, and no connection gets one of
the descriptors that visitors may not use up.

A reload calls `bind_again` and then `ReloadableListener.exchange`: what can fail comes first and changes nothing. A
listener that is replaced is drained before it is closed, so that no client that was connected already is lost.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import structlog
import trio

from tunneld.errors import reason_of
from tunneld.net import sockets
from tunneld.net.accept import ACCEPT_BACKOFF, CONNECTION_LOST, AcceptShortage, unmap_address

log: structlog.stdlib.BoundLogger = structlog.get_logger("net")

MAX_ACCEPTS_PER_TURN = 16
"""Connections accepted before other tasks run. A turn may come only every few milliseconds while relays are busy, and
the work that each connection causes at once is small.
"""

ConnectionCallback = Callable[[socket.socket, Any], None]
"""Called with a connection (non-blocking, close-on-exec), which it owns, and the peer's address. It must not wait or
raise.
"""


class Accepting(Protocol):
    """A listener from which an engine accepts: `engine.Registration`."""

    def release(self) -> None:
        """Accept no more, and leave the listener open."""


Listen = Callable[[socket.socket, ConnectionCallback, Callable[[Exception], None]], Accepting]
"""Lets an engine accept: `Engine.listen`."""


@dataclass(frozen=True, slots=True)
class BindAddress:
    """Where a service listens, as configured: a host, which may resolve to several addresses, and a port; 0 is any."""

    host: str
    port: int


class ReloadableListener:
    """The listeners of the service `name`. It owns them, and accepts while `serve` runs."""

    def __init__(self, name: str, listeners: Iterable[socket.socket] = ()) -> None:
        self.name = name
        self._listeners: dict[socket.socket, trio.CancelScope] = {each: trio.CancelScope() for each in listeners}
        self._nursery: trio.Nursery | None = None
        self._listen: Listen | None = None
        self._accepting: dict[socket.socket, Accepting] = {}
        self._on_connection: ConnectionCallback
        self._on_shared: ConnectionCallback
        self._shortage = AcceptShortage(self._log_shortage)

    @property
    def listeners(self) -> list[socket.socket]:
        """The sockets that accept now."""
        return list(self._listeners)

    @property
    def port(self) -> int:
        """The port of the first listener, or 0 if there is none."""
        return next((int(listener.getsockname()[1]) for listener in self._listeners), 0)

    async def serve(
        self,
        on_connection: ConnectionCallback,
        *,
        on_shared: ConnectionCallback | None = None,
        listen: Listen | None = None,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Accept until cancelled; then close every listener. Connections by `deliver` go to `on_shared`, if it is
        given. With `listen` an engine accepts.
        """
        self._on_connection, self._on_shared, self._listen = on_connection, on_shared or on_connection, listen
        try:
            async with trio.open_nursery() as self._nursery:
                for listener, scope in self._listeners.items():
                    self._begin(listener, scope)
                task_status.started()
                await trio.sleep_forever()
        finally:
            for listener in list(self._accepting):
                self._release(listener)
                listener.close()

    def deliver(self, connection: socket.socket, peer: Any) -> bool:
        """Pass a connection, which was accepted on a port that services share, to this one. False: it does not run, and
        the connection is still the caller's.
        """
        if self._nursery is None or not self._listeners:
            return False
        self._pass_on(self._on_shared, connection, peer)
        return True

    def exchange(self, listeners: Iterable[socket.socket]) -> None:
        """Accept from these listeners from now on, and close all previous ones that are not among them.

        Listeners that stay are not interrupted.
        """
        before, now = self._listeners, list(listeners)
        self._listeners = {each: before.get(each) or trio.CancelScope() for each in now}
        for listener, scope in before.items():
            if listener not in self._listeners:
                self._drain(listener)
                self._close(listener, scope)
        for listener, scope in self._listeners.items():
            if listener not in before and self._nursery is not None:
                self._begin(listener, scope)

    def export(self) -> list[socket.socket]:
        """Return copies of the listeners for another owner and stop accepting. New clients wait in the queues."""
        exported = []
        for listener, scope in self._listeners.items():
            exported.append(listener.dup())
            self._close(listener, scope)
        self._listeners = {}
        return exported

    def _begin(self, listener: socket.socket, scope: trio.CancelScope) -> None:
        """Accept from now on."""
        if self._listen is not None:
            on_connection = partial(self._pass_on, self._on_connection)
            self._accepting[listener] = self._listen(listener, on_connection, self._log_bug)
        elif self._nursery is not None:
            self._nursery.start_soon(self._accept, listener, scope)

    def _release(self, listener: socket.socket) -> None:
        if (accepting := self._accepting.pop(listener, None)) is not None:
            accepting.release()

    def _close(self, listener: socket.socket, scope: trio.CancelScope) -> None:
        scope.cancel()
        self._release(listener)
        if self._nursery is not None:
            trio.lowlevel.notify_closing(listener)
        listener.close()

    def _drain(self, listener: socket.socket) -> None:
        while self._nursery is not None and self._accept_one(listener):
            pass

    async def _accept(self, listener: socket.socket, scope: trio.CancelScope) -> None:
        """Accept until the listener is closed or cancelled."""
        with listener, scope:
            while not scope.cancel_called:  # it may be closed before this task has begun
                try:
                    await trio.lowlevel.wait_readable(listener)
                except trio.ClosedResourceError:
                    return
                if not all(self._accept_one(listener) for _ in range(MAX_ACCEPTS_PER_TURN)) and self._shortage.active:
                    await trio.sleep(ACCEPT_BACKOFF)

    def _accept_one(self, listener: socket.socket) -> bool:
        """Accept one connection and hand it over. Return False if none waits, or if accept fails, as in a shortage; in
        that case connections stay in the queue.
        """
        try:
            connection, address = listener.accept()
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno in CONNECTION_LOST:
                return True
            self._shortage.begin(error)
            return False
        self._shortage.end()
        connection.setblocking(False)
        self._pass_on(self._on_connection, connection, unmap_address(address))
        return True

    def _pass_on(self, callback: ConnectionCallback, connection: socket.socket, peer: Any) -> None:
        try:
            callback(connection, peer)
        except Exception as error:
            connection.close()
            self._log_bug(error)

    def _log_bug(self, error: Exception) -> None:
        log.error("could not handle a connection: internal error", service=self.name, exc_info=error)

    def _log_shortage(self, error: OSError) -> None:
        event = f"could not accept {self.name} connections"
        log.error(event, reason=reason_of(error))


def bind_again(
    listeners: Mapping[str, ReloadableListener],
    now: Mapping[str, BindAddress | None],
    then: Mapping[str, BindAddress | None],
) -> Bound:
    """Bind what differs between two configurations, by service name; None means that a service does not listen.

    Nothing changes until `exchange` is called with the result for each service. Raises `ListenError` or
    `ShortageError`, and closes everything that it has bound.
    """
    bound: Bound = {}
    try:
        for name, address in then.items():
            if address == now[name]:
                continue
            held = listeners[name].listeners
            bound[name] = sockets.bind_tcp(address.host, address.port, held=held) if address is not None else []
    except BaseException:
        for name, fresh in bound.items():
            for listener in set(fresh) - set(listeners[name].listeners):
                listener.close()
        raise
    return bound


Bound = dict[str, list[socket.socket]]
"""The listeners for `ReloadableListener.exchange`, by service name; only services that change are in it."""
