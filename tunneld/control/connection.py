"""One control connection as lines of text: reads lines, writes bytes with a timeout, and closes so that the last reply
reaches the peer.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Callable
from types import TracebackType
from typing import Self

import trio

from tunneld.config.schema import ControlSettings
from tunneld.directory.reply import TakeConnection
from tunneld.errors import RemoteProtocolError
from tunneld.net.sockets import taken_out
from tunneld.tls.connection import HANDSHAKE, PEER_CLOSED, TlsSocket
from tunneld.tls.session import is_truncation
from tunneld.tls.stream import TlsStream
from tunneld.wire.lines import LineBuffer

CONTROL_READ_SIZE = 4096
"""Bytes per read, and so the most that is read ahead of the request being executed: one line of maximal length."""

SEND_SLICE = 16 * 1024
"""Bytes that must be sent within `write_timeout`: a long reply may take as long as it needs while its reader reads."""

FINAL_REPLY_TIMEOUT = 1.0
"""Seconds for the reply to the request that stopped the daemon, and for TLS to send close_notify."""

DISCARD_TIMEOUT = 2.0
"""Seconds for which input is discarded after a final error; see `LineConnection.discard_input`."""

MAX_DISCARDED_INPUT = 4 * 1024 * 1024
"""Bytes of input discarded after a final error."""


class PeerLeftError(Exception):
    """The peer broke the connection or does not read. It ends this session and nothing else."""


class LineConnection:
    """Reads lines and writes bytes over a TCP or TLS stream. At most one task reads and one task writes at a time.

    As an async context manager it closes the stream at the end. `settings` is called at each use.
    """

    def __init__(self, stream: trio.abc.Stream, settings: Callable[[], ControlSettings]) -> None:
        self._stream = stream
        self._settings = settings
        self._lines = LineBuffer()
        self._received_any = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the stream. TLS sends close_notify if the peer accepts it within `FINAL_REPLY_TIMEOUT`."""
        with trio.move_on_after(FINAL_REPLY_TIMEOUT):
            await self._stream.aclose()

    async def send(self, data: bytes | bytearray) -> None:
        """Send all of `data`. Raises `PeerLeftError` if the connection breaks, or if the peer takes no slice of it
        within `write_timeout` seconds.

        When the daemon is being stopped, possibly by the request that this answers, the reply is still sent if that
        takes at most `FINAL_REPLY_TIMEOUT`; this also holds if the stop comes while the reply is being sent.
        """
        stopping = trio.current_effective_deadline() == -math.inf
        timeout = FINAL_REPLY_TIMEOUT if stopping else self._settings().write_timeout
        view = memoryview(data)
        for start in range(0, len(view), SEND_SLICE):
            scope = trio.CancelScope(deadline=trio.current_time() + timeout, shield=stopping)
            if stopping or isinstance(self._stream, trio.SocketStream):
                with scope:
                    await self._send_slice(view[start : start + SEND_SLICE])
            else:
                await self._send_slice_shielded(view[start : start + SEND_SLICE], scope)
            if scope.cancelled_caught:
                raise PeerLeftError(f"peer read nothing for {timeout:g} s")

    async def _send_slice_shielded(self, data: memoryview, scope: trio.CancelScope) -> None:
        """Send a slice over TLS, where a send has several steps. If the daemon is stopped when the send is half done,
        it has `FINAL_REPLY_TIMEOUT` seconds to finish.
        """
        scope.shield = True
        failure: PeerLeftError | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_limit_when_cancelled, scope)
            try:
                with scope:
                    await self._send_slice(data)
            except PeerLeftError as error:  # raised after the nursery, which would wrap it in an exception group
                failure = error
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure

    async def _send_slice(self, data: memoryview) -> None:
        try:
            await self._stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise PeerLeftError(reason_of_break(error)) from None

    async def next_line(self) -> bytes | None:
        """Receive the next line; None at the end of the stream. An unfinished last line is dropped, because it may have
        been cut.

        Raises `RemoteProtocolError` for a line that is too long or for TLS on a plain port, `PeerLeftError` if the
        connection breaks.
        """
        while (line := self._lines.next_line()) is None:
            if not await self._receive():
                return None
        return line

    @property
    def has_buffered_input(self) -> bool:
        """Whether input was received that belongs to no executed request."""
        return bool(self._lines)

    async def wait_for_input(self) -> None:
        """Wait until the peer sends anything, or ends or breaks the connection. Raises as `next_line` does."""
        await self._receive()

    async def _receive(self) -> bool:
        try:
            data = await self._stream.receive_some(CONTROL_READ_SIZE)
        except trio.BrokenResourceError as error:
            raise PeerLeftError(reason_of_break(error)) from None
        if not self._received_any and data[:1] == HANDSHAKE:
            raise RemoteProtocolError("this port speaks plain text, not TLS; use tcp:// or set [control.tls]")
        self._received_any = True
        self._lines.feed(data)
        return bool(data)

    def hand_over(self, take: TakeConnection) -> None:
        """Give the connection to another owner, and be closed."""
        if isinstance(self._stream, TlsStream):
            connection: socket.socket | TlsSocket = self._stream.detach()
        else:
            assert isinstance(self._stream, trio.SocketStream)
            connection = taken_out(self._stream.socket)
        take(connection, self._lines.take_rest())

    async def discard_input(self) -> None:
        """Send end of file, then read and discard input for a short time. Call it before closing after a final error.

        Closing a socket that holds unread input resets the connection, and the reset destroys what was sent.
        """
        discarded = 0
        with trio.move_on_after(DISCARD_TIMEOUT):
            try:
                if isinstance(self._stream, trio.SocketStream):
                    await self._stream.send_eof()
                while discarded < MAX_DISCARDED_INPUT:
                    data = await self._stream.receive_some(MAX_DISCARDED_INPUT // 64)
                    if not data:
                        break
                    discarded += len(data)
            except trio.BrokenResourceError:
                pass


async def _limit_when_cancelled(scope: trio.CancelScope) -> None:
    """Wait until this task is cancelled, then leave `scope` at most `FINAL_REPLY_TIMEOUT` seconds."""
    try:
        await trio.sleep_forever()
    finally:
        scope.deadline = min(scope.deadline, trio.current_time() + FINAL_REPLY_TIMEOUT)


def reason_of_break(error: Exception) -> str:
    """The reason for a broken stream: the error of the system or of OpenSSL, which Trio keeps as the cause."""
    return reason_of_failure(error.__cause__ or error)


def reason_of_failure(error: BaseException) -> str:
    """The same of the error itself."""
    return PEER_CLOSED if is_truncation(error) else str(error) or "connection is broken"
