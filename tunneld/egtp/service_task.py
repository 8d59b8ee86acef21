"""Serves one connection of a node that uses the relay service.

    serve_node
    ├─ reads                    socket ──► ServiceConnection.receive; waits while much output is unsent
    └─ writes                   ServiceConnection.outgoing ──► socket; and the timeouts of requests

These connections carry messages and not bytes of visitors, so they have tasks and do not live in the pump. Opening and
sealing envelopes can take long; one connection at a time does a piece of it, and then all other tasks have a turn. So
a crowd of nodes delays the relay's visitors no more than one.
"""

from __future__ import annotations

import socket

import trio

from tunneld.egtp.service_connection import ENOUGH_UNSENT, ServiceConnection
from tunneld.errors import NotAllowedError, RemoteProtocolError, reason_of
from tunneld.net.liveness import set_keepalive

READ_SIZE = 64 * 1024


async def serve_node(connection: socket.socket, node: ServiceConnection, keepalive: float, turn: trio.Lock) -> str:
    """Serve a node until its connection ends; return why it did. The caller owns the non-blocking socket, and has fed
    what it read before.

    A silent connection is probed after `keepalive` seconds. All connections share `turn`. Messages that were not
    acknowledged wait in the mailbox again when this returns or is cancelled.
    """
    set_keepalive(connection, keepalive)
    task = _ServiceTask(connection, node, turn)
    node.on_output = task.wake
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(task.read, nursery.cancel_scope)
            nursery.start_soon(task.write, nursery.cancel_scope)
    finally:
        node.close()
    return task.reason


class _ServiceTask:
    """Two tasks of one connection. `reason` is why it ended."""

    def __init__(self, connection: socket.socket, node: ServiceConnection, turn: trio.Lock) -> None:
        self._turn = turn
        self.reason = "the relay stopped"
        self._connection = connection
        self._node = node
        self._has_output = trio.Event()
        self._has_room = trio.Event()

    def wake(self) -> None:
        """There is output."""
        self._has_output.set()

    async def read(self, scope: trio.CancelScope) -> None:
        """Read until the connection ends; then cancel `scope`."""
        try:
            done, data = False, b""
            while not done or (data := await self._receive()):
                if not done:
                    await self._room()
                async with self._turn:
                    await trio.lowlevel.checkpoint()
                    done = self._node.receive(data)
                data = b""
                self.wake()
            self._end("the node closed the connection", scope)
        except (RemoteProtocolError, NotAllowedError) as problem:
            self._send_last()
            self._end(str(problem), scope)
        except OSError as error:
            self._end(f"connection lost: {reason_of(error)}", scope)

    async def write(self, scope: trio.CancelScope) -> None:
        """Write output as it comes, and apply the timeouts of requests; cancel `scope` if the connection is lost."""
        try:
            while True:
                with trio.move_on_at(self._node.next_deadline):
                    await self._has_output.wait()
                self._has_output = trio.Event()
                self._node.due()
                while self._node.unsent:
                    if self._node.outgoing:
                        await self._send()
                    else:
                        async with self._turn:
                            await trio.lowlevel.checkpoint()
                            self._node.seal_more()
                    if self._node.unsent < ENOUGH_UNSENT:
                        self._has_room.set()
        except OSError as error:
            self._end(f"connection lost: {reason_of(error)}", scope)

    def _end(self, reason: str, scope: trio.CancelScope) -> None:
        if not scope.cancel_called:
            self.reason = reason
            scope.cancel()

    async def _room(self) -> None:
        """Wait until little output is unsent."""
        while self._node.unsent >= ENOUGH_UNSENT:
            self._has_room = trio.Event()
            await self._has_room.wait()

    async def _receive(self) -> bytes:
        while True:
            await trio.lowlevel.wait_readable(self._connection)
            try:
                return self._connection.recv(READ_SIZE)
            except BlockingIOError:
                continue

    async def _send(self) -> None:
        await trio.lowlevel.wait_writable(self._connection)
        try:
            with memoryview(self._node.outgoing) as output:
                sent = self._connection.send(output)
        except BlockingIOError:
            return
        del self._node.outgoing[:sent]
        self._node.on_written()

    def _send_last(self) -> None:
        """Send what the kernel takes now: it may say why the connection ends."""
        try:
            self._connection.send(self._node.outgoing)
        except OSError:  # BlockingIOError is one
            return
