"""One accepted connection: moves bytes between its socket and Hypercorn's HTTP/1.1 protocol.

    connection            reads
    └─ request            the ASGI application; writes

Hypercorn's own counterpart (`TCPServer`) is not used, for three reasons. It writes under a shield, so a client that
leaves an answer unread holds our end for ever. Its `read_timeout` also runs while an answer is being made, and would
cut every `watch`. It upgrades to HTTP/2 on request, where a client that leaves at the right moment leaks a task. Here:

- *Every wait has a timeout.* The head of a request has `keep_alive_timeout`, counted from the end of the previous
  request; a body has the time that body.py gives it; each write has `write_timeout`. Until a request has authenticated,
  all of them together have the deadline of the connection, which health probes do not extend.
- *An answer that was sent is received.* Closing a socket that holds unread bytes resets the connection, and the reset
  overtakes the answer, so a client that sent too large a body would never see its 413. After sending end of file, we
  read and discard for a moment (RFC 9112 §9.6).
"""

from __future__ import annotations

import math
from typing import Any, cast

import h11
import trio
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.trio.task_group import TaskGroup
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import AppWrapper, ConnectionState

from tunneld.http.auth import CONNECTION_INFO, ConnectionInfo
from tunneld.net.accept import local_address, peer_address
from tunneld.tls.stream import TlsStream

FINAL_WRITE_TIMEOUT = 0.5
"""Seconds for a write that begins after this connection was cancelled, or at its deadline: a client gets its answer."""

CLOSE_TIMEOUT = 2.0
"""Seconds that a client has to close after our end of file: the longest round trips are below one second."""

MAX_DISCARDED_BYTES = 4 * 1024 * 1024
"""Bytes discarded in that time: what is in flight on a fast long-distance connection, and cheap to read."""

_READ_SIZE = 65536


class Http1(H11Protocol):
    """HTTP/1.1 only: an upgrade to HTTP/2 or WebSocket is declined, which RFC 9110 §7.8 permits."""

    async def _check_protocol(self, event: h11.Request) -> None:
        """Never change the protocol."""

    async def _create_stream(self, request: h11.Request) -> None:
        """Begin a request without its Upgrade header, for which Hypercorn would create a WebSocket.

        That ends in an exception if the client sends more before the answer, a second upgrade for example.
        """
        if any(name == b"upgrade" for name, _ in request.headers):
            headers = [(name, value) for name, value in request.headers if name != b"upgrade"]
            request = h11.Request(
                method=request.method, target=request.target, headers=headers, http_version=request.http_version
            )
        await super()._create_stream(request)


class ApiConnection:
    """Serves HTTP on one stream. `write_timeout` is in seconds."""

    def __init__(
        self,
        stream: trio.SocketStream | TlsStream,
        app: AppWrapper,
        config: Config,
        write_timeout: float,
        info: ConnectionInfo,
    ) -> None:
        self._stream = stream
        self._info = info
        self._write_timeout = write_timeout
        self._app = app
        self._config = config
        self._protocol: Http1
        self._read_scope = trio.CancelScope()  # around every read; its deadline is that of the next head
        self._write_lock = trio.Lock()
        self._ending = False  # from then on input is discarded
        self._eof_sent = False
        self._discarded = 0

    async def run(self) -> None:
        """Serve requests until either side ends the connection. The caller closes the stream."""
        client, server = peer_address(self._stream.socket)[:2], local_address(self._stream.socket)[:2]
        self._read_scope.deadline = self._info.head_deadline(self._config.keep_alive_timeout)
        async with TaskGroup() as requests:
            self._protocol = Http1(
                self._app,
                self._config,
                cast("Any", WorkerContext(None)),
                cast("Any", requests),
                ConnectionState({CONNECTION_INFO: self._info}),
                ssl=isinstance(self._stream, TlsStream),
                client=client,
                server=server,
                send=self._on_event,
            )
            with self._read_scope:
                await self._read()
            if trio.current_time() >= self._info.deadline:
                self._info.slot.has_begun = True  # it held a place for the whole time
            await self._protocol.handle(Closed())

    async def _read(self) -> None:
        """Read until the peer ends, or until `MAX_DISCARDED_BYTES` were discarded."""
        while self._discarded < MAX_DISCARDED_BYTES:
            try:
                data = await self._stream.receive_some(_READ_SIZE)
            except trio.BrokenResourceError:
                return
            if self._ending:
                self._discarded += len(data)
            else:
                await self._protocol.handle(RawData(bytes(data)))
            if not data:
                return

    async def _on_event(self, event: Event) -> None:
        """Carry out an event of the protocol. Hypercorn calls this."""
        match event:
            case RawData(data=data):
                await self._write(data)
            case Updated(idle=True):
                self._read_scope.deadline = self._info.head_deadline(self._config.keep_alive_timeout)
            case Updated():
                self._read_scope.deadline = math.inf
            case Closed() if self._protocol.stream is not None and self._protocol.connection.our_state is h11.SEND_BODY:
                self._ending = True  # what follows the request is malformed; its answer is on its way
            case Closed():
                await self._finish()

    async def _write(self, data: bytes) -> None:
        """Write all of `data`. If the peer does not read it in time, the connection ends. Does nothing after the end of
        file: a peer that broke the protocol has received an error instead of the answer.
        """
        written = False
        with self._write_scope():
            async with self._write_lock:
                try:
                    if not self._eof_sent:
                        await self._stream.send_all(data)
                    written = True
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    pass
        if not written:
            self._read_scope.cancel()
            await self._protocol.handle(Closed())

    def _write_scope(self) -> trio.CancelScope:
        """The cancel scope of one write: `write_timeout`, within the deadline of an unauthenticated connection. At its
        end, and under a shield once we are cancelled, `FINAL_WRITE_TIMEOUT` is left.
        """
        cancelled, now = trio.current_effective_deadline() == -math.inf, trio.current_time()
        latest = now if cancelled else min(now + self._write_timeout, self._info.deadline)
        deadline = max(latest, now + min(FINAL_WRITE_TIMEOUT, self._write_timeout))
        return trio.CancelScope(deadline=deadline, shield=cancelled)

    async def _finish(self) -> None:
        """Send end of file and give the peer `CLOSE_TIMEOUT` to close."""
        self._ending = True
        async with self._write_lock:  # a write may be in progress if the reader found malformed input
            if not self._eof_sent:
                self._eof_sent = True
                self._read_scope.deadline = trio.current_time() + CLOSE_TIMEOUT
                try:
                    await self._stream.send_eof()
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    self._read_scope.cancel()
        await self._protocol.handle(Closed())
