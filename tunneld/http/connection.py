"""One accepted connection: octets between its socket and Hypercorn's HTTP/1.1.

    connection            reads
    └─ request            the ASGI application; writes

Hypercorn's own half of this (`TCPServer`) writes under a shield, so that one client that leaves an answer unread
holds our end for ever; its `read_timeout` also runs while an answer is being made, and would cut every `watch`;
and it changes to HTTP/2 for whoever asks, where a client that leaves in time leaves a task behind. Here,

- *nobody is waited for without end*: a head has `keep_alive_timeout` to come, from the end of the request before it, a
  body has the time that body.py gives it, and each write has `write_timeout`;
- *an answer that was sent is received*: closing a socket that holds unread octets resets the connection, and the reset
  overtakes the answer, so the client of a body that was too large would never hear 413. After our end of file we go
  on reading for a moment, and throw away what comes (RFC 9112 §9.6).
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

from tunneld.http.auth import GUEST, ConnectionInfo
from tunneld.tls.connection import TlsStream

LAST_WORD = 0.5
"""Seconds for a write that begins after our end was decided: who asked for that end gets its answer, if it reads it."""

LINGER = 2.0
"""Seconds that a client has to notice our end of file: the longest round trips are below one."""

MAX_DISCARD = 4 * 1024 * 1024
"""Octets thrown away in that time: what is in flight on a fast and long line, and cheap to read."""

_CHUNK = 65536


def _patience_of_a_write(write_timeout: float) -> trio.CancelScope:
    """How long a write may take: while we live, until somebody ends us."""
    ending = trio.current_effective_deadline() == -math.inf
    timeout = LAST_WORD if ending else write_timeout
    return trio.CancelScope(deadline=trio.current_time() + timeout, shield=ending)


class Http1(H11Protocol):
    """HTTP/1.1 and nothing else: an offer of HTTP/2 is not taken up, which RFC 9110 §7.8 leaves to us."""

    async def _check_protocol(self, event: h11.Request) -> None:
        """Never change the protocol."""


class HttpConnection:
    """Speaks HTTP on one stream."""

    def __init__(
        self,
        stream: trio.SocketStream | TlsStream,
        app: AppWrapper,
        config: Config,
        write_timeout: float,
        guest: ConnectionInfo,
    ) -> None:
        self._stream = stream
        self._guest = guest
        self._write_timeout = write_timeout  # seconds: a reader that takes nothing for so long is gone
        self._app = app
        self._config = config
        self._protocol: Http1
        self._patience = trio.CancelScope()  # around every read
        self._writing = trio.Lock()
        self._finishing = False  # our end of file is sent: what comes is discarded
        self._discarded = 0

    async def run(self) -> None:
        """Serve requests until either side has enough; closing the stream is left to the caller."""
        client, server = self._stream.socket.getpeername()[:2], self._stream.socket.getsockname()[:2]
        self._patience.deadline = min(trio.current_time() + self._config.keep_alive_timeout, self._guest.deadline)
        async with TaskGroup() as requests:
            self._protocol = Http1(
                self._app,
                self._config,
                cast("Any", WorkerContext(None)),
                cast("Any", requests),
                ConnectionState({GUEST: self._guest}),
                ssl=isinstance(self._stream, TlsStream),
                client=client,
                server=server,
                send=self._obey,
            )
            with self._patience:
                await self._read()
            await self._protocol.handle(Closed())

    async def _read(self) -> None:
        """Read to the end, or until what we throw away becomes too much."""
        while self._discarded < MAX_DISCARD:
            try:
                data = await self._stream.receive_some(_CHUNK)
            except trio.BrokenResourceError:
                return
            if self._finishing:
                self._discarded += len(data)
            else:
                await self._protocol.handle(RawData(bytes(data)))
            if not data:
                return

    async def _obey(self, event: Event) -> None:
        """Do what the protocol says."""
        match event:
            case RawData(data=data):
                await self._write(data)
            case Updated(idle=True):
                self._wait_for_head()
            case Updated():
                self._patience.deadline = math.inf
            case Closed():
                await self._finish()

    def _wait_for_head(self) -> None:
        self._patience.deadline = trio.current_time() + self._config.keep_alive_timeout

    async def _write(self, data: bytes) -> None:
        """Write, or find that the peer does not take it, which is its end."""
        written = False
        with _patience_of_a_write(self._write_timeout):
            async with self._writing:
                try:
                    await self._stream.send_all(data)
                    written = True
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    pass
        if not written:
            self._patience.cancel()
            await self._protocol.handle(Closed())

    async def _finish(self) -> None:
        """End our direction and give the peer a moment to end its own."""
        if not self._finishing:
            self._finishing = True
            self._patience.deadline = trio.current_time() + LINGER
            try:
                await self._stream.send_eof()
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                self._patience.cancel()
        await self._protocol.handle(Closed())
