"""A door: the listening sockets of one face, which can be exchanged while the face serves.

    door
    └─ acceptor ×listener    never waits for a peer; ends with its listener, and no connection ends with it

Exchanging is `bind_again` and then `ReloadableListener.exchange`: what can fail comes first and changes nothing. A listener that goes
is emptied before it is closed, so that nobody who was connected already is lost.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import structlog
import trio

from tunneld.errors import reason_of
from tunneld.net import sockets

log: structlog.stdlib.BoundLogger = structlog.get_logger("doors")

ACCEPT_BACKOFF = 0.1
"""Seconds until the next try when descriptors ran out: long enough not to spin, short enough not to be noticed."""

BATCH = 16
"""Connections taken before others have their turn: a turn may come only every few milliseconds while relays are busy,
and what each of them costs at once is little.
"""

Arrive = Callable[[socket.socket, Any], None]
"""Takes a connection (non-blocking, close-on-exec) and its peer's address; it neither waits nor raises."""


@dataclass(frozen=True, slots=True)
class BindAddress:
    """Where a face listens, as it is configured: a host, which may be several addresses, and a port; 0 is any."""

    host: str
    port: int


class ReloadableListener:
    """The listeners of the face called `face`, ours from here on. They accept while `serve` runs."""

    def __init__(self, face: str, listeners: Iterable[socket.socket] = ()) -> None:
        self.face = face
        self._listeners: dict[socket.socket, trio.CancelScope] = {one: trio.CancelScope() for one in listeners}
        self._nursery: trio.Nursery | None = None
        self._arrive: Arrive
        self._failing = False  # said once, not once a try

    @property
    def listeners(self) -> list[socket.socket]:
        """Those that accept now."""
        return list(self._listeners)

    @property
    def port(self) -> int:
        """Of the first listener; 0 where there is none."""
        return next((int(one.getsockname()[1]) for one in self._listeners), 0)

    async def serve(self, arrive: Arrive, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Accept until cancelled; then every listener is closed."""
        self._arrive = arrive
        async with trio.open_nursery() as self._nursery:
            for listener, scope in self._listeners.items():
                self._nursery.start_soon(self._accept, listener, scope)
            task_status.started()
            await trio.sleep_forever()

    def exchange(self, listeners: Iterable[socket.socket]) -> None:
        """Listen on these from now on, and on no others. Those that are among them already go on undisturbed."""
        before, now = self._listeners, list(listeners)
        self._listeners = {one: before.get(one) or trio.CancelScope() for one in now}
        for listener, scope in before.items():
            if listener not in self._listeners:
                self._empty(listener)
                self._shut(listener, scope)
        for listener, scope in self._listeners.items():
            if listener not in before and self._nursery is not None:
                self._nursery.start_soon(self._accept, listener, scope)

    def export(self) -> list[socket.socket]:
        """The listeners, for another owner; nobody is accepted any more, and whoever comes stands in their queues."""
        left = []
        for listener, scope in self._listeners.items():
            left.append(listener.dup())
            self._shut(listener, scope)
        self._listeners = {}
        return left

    def _shut(self, listener: socket.socket, scope: trio.CancelScope) -> None:
        scope.cancel()
        if self._nursery is not None:
            trio.lowlevel.notify_closing(listener)
        listener.close()

    def _empty(self, listener: socket.socket) -> None:
        while self._nursery is not None and self._accept_one(listener):
            pass

    async def _accept(self, listener: socket.socket, scope: trio.CancelScope) -> None:
        """Accept for ever."""
        with listener, scope:
            while not scope.cancel_called:  # it may be gone before this task has begun
                try:
                    await trio.lowlevel.wait_readable(listener)
                except trio.ClosedResourceError:
                    return
                if not all(self._accept_one(listener) for _ in range(BATCH)) and self._failing:
                    await trio.sleep(ACCEPT_BACKOFF)

    def _accept_one(self, listener: socket.socket) -> bool:
        """Take one connection, where one waits and there is a descriptor for it; what cannot be taken goes on waiting
        in its queue.
        """
        try:
            connection, address = listener.accept()
        except BlockingIOError:
            return False
        except OSError as error:
            self._cannot_accept(error)
            return False
        self._failing = False
        connection.setblocking(False)
        try:
            self._arrive(connection, address)
        except Exception:
            connection.close()
            log.exception("could not take a connection: a bug", service=self.face)
        return True

    def _cannot_accept(self, error: OSError) -> None:
        if not self._failing:
            event = f"{self.face} accepts no connections for now"
            log.error(event, reason=reason_of(error))
        self._failing = True


def bind_again(
    doors: Mapping[str, ReloadableListener],
    now: Mapping[str, BindAddress | None],
    then: Mapping[str, BindAddress | None],
) -> Bound:
    """Bind what lies between two plans, by face; None: that face listens nowhere. Nothing has changed until each is
    exchanged.

    Raises `ListenError` or `ShortageError`, and has closed everything it bound then.
    """
    bound: Bound = {}
    try:
        for face, place in then.items():
            if place == now[face]:
                continue
            held = doors[face].listeners
            bound[face] = sockets.bind_tcp(place.host, place.port, held=held) if place is not None else []
    except BaseException:
        for face, listeners in bound.items():
            for fresh in set(listeners) - set(doors[face].listeners):
                fresh.close()
        raise
    return bound


Bound = dict[str, list[socket.socket]]
"""The listeners to exchange for those of each face that changes, and none of the others."""
