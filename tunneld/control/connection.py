"""One control connection as lines: read at the peer's pace, written with patience that ends, closed so that last
words arrive.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import TracebackType
from typing import Self

import trio

from tunneld.config.schema import ControlSettings
from tunneld.errors import RemoteProtocolError
from tunneld.tls.connection import PEER_CLOSED, is_truncation
from tunneld.wire.lines import LineBuffer

READ_SIZE = 4096
"""Octets read at once, and so the most that is read ahead of the request being carried out: one longest line."""

SLICE = 16 * 1024
"""Octets that must go within `write_timeout`: a long reply may take as long as it needs while its reader reads."""

LAST_WORD = 1.0
"""Seconds for the answer to the request that stopped the daemon, and for a TLS goodbye."""

LINGER = 2.0
"""Seconds, and"""
LINGER_OCTETS = 4 * 1024 * 1024
"""octets that we read away after the last word: closing on unread octets is a reset, and a reset destroys what we
said.
"""

TLS_HANDSHAKE = b"\x16"
"""The first octet of every TLS connection (RFC 8446 §5.1, ContentType handshake); no line of ours begins so."""


class PeerLeftError(Exception):
    """The peer broke the connection or takes nothing any more. Only its conversation ends."""


class LineConnection:
    """Lines in, octets out, over TCP or TLS. One task reads, one writes; they may be the same."""

    def __init__(self, stream: trio.abc.Stream, settings: Callable[[], ControlSettings]) -> None:
        self._stream = stream
        self._settings = settings
        self._lines = LineBuffer()
        self._heard_nothing = True

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close. In TLS that says goodbye, as long as the peer takes it."""
        with trio.move_on_after(LAST_WORD):
            await self._stream.aclose()

    async def send(self, data: bytes | bytearray) -> None:
        """Send all of `data`. Raises `PeerLeftError`, also where the peer takes no slice of it for `write_timeout`
        seconds.

        When the daemon is being stopped, perhaps by the very request that is answered here, the answer still gets
        out if it can at once, also where that begins while it is on its way.
        """
        stopping = trio.current_effective_deadline() == -math.inf
        patience = LAST_WORD if stopping else self._settings().write_timeout
        view = memoryview(data)
        for start in range(0, len(view), SLICE):
            waiting = trio.CancelScope(deadline=trio.current_time() + patience, shield=stopping)
            if stopping or isinstance(self._stream, trio.SocketStream):
                with waiting:
                    await self._send_slice(view[start : start + SLICE])
            else:
                await self._send_steps(view[start : start + SLICE], waiting)
            if waiting.cancelled_caught:
                raise PeerLeftError(f"took nothing for {patience:g} s")

    async def _send_steps(self, data: memoryview, waiting: trio.CancelScope) -> None:
        """The same in TLS, where a send has several steps: one that has begun when we are stopped may be half done, and
        has `LAST_WORD` seconds to be done.
        """
        waiting.shield = True
        failure: PeerLeftError | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_hurry, waiting)
            try:
                with waiting:
                    await self._send_slice(data)
            except PeerLeftError as error:  # carried out by hand: a nursery would wrap it in a group
                failure = error
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure

    async def _send_slice(self, data: memoryview) -> None:
        try:
            await self._stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise PeerLeftError(why(error)) from None

    async def next_line(self) -> bytes | None:
        """Take the next line; None when the peer has ended (an unfinished last line is not a line: it may have been
        cut).

        Raises `RemoteProtocolError` for an endless line or TLS on a plain port, `PeerLeftError` for a broken
        connection.
        """
        while (line := self._lines.next_line()) is None:
            if not await self._receive():
                return None
        return line

    @property
    def typed_ahead(self) -> bool:
        """Whether something was read that is not a request answered already."""
        return bool(self._lines)

    async def wait_typed(self) -> None:
        """Sleep until the peer sends anything at all, or ends or breaks the connection."""
        await self._receive()

    async def _receive(self) -> bool:
        try:
            data = await self._stream.receive_some(READ_SIZE)
        except trio.BrokenResourceError as error:
            raise PeerLeftError(why(error)) from None
        if self._heard_nothing and data[:1] == TLS_HANDSHAKE:
            raise RemoteProtocolError("this port speaks plain text, not TLS; use tcp:// or set [control.tls]")
        self._heard_nothing = False
        self._lines.feed(data)
        return bool(data)

    async def read_away(self) -> None:
        """After a last word to a peer that still sends: let it arrive before the connection is closed."""
        octets = 0
        with trio.move_on_after(LINGER):
            try:
                if isinstance(self._stream, trio.SocketStream):
                    await self._stream.send_eof()
                while octets < LINGER_OCTETS and (data := await self._stream.receive_some(LINGER_OCTETS // 64)):
                    octets += len(data)
            except trio.BrokenResourceError:
                pass


async def _hurry(waiting: trio.CancelScope) -> None:
    """Sleep until we are stopped; then there is little time left."""
    try:
        await trio.sleep_forever()
    finally:
        waiting.deadline = min(waiting.deadline, trio.current_time() + LAST_WORD)


def why(error: Exception) -> str:
    """The reason behind a broken stream: the system's or OpenSSL's, which trio keeps as the cause."""
    cause = error.__cause__
    if is_truncation(cause):
        return PEER_CLOSED
    return str(cause or error) or "connection is broken"
