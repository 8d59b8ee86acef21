"""Visitors that come on ducts: who it is comes first, in a PROXY header; then it is handed over."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import trio

from tunneld.agent.pool import Parked
from tunneld.errors import RemoteProtocolError, reason_of
from tunneld.relay.engine import Failure, Relay, RelayEnd, Side
from tunneld.relay.pump import Pump
from tunneld.session import ChannelStream, Duct, TlsDuct
from tunneld.session.duct import UNUSED
from tunneld.tls import TlsSocket
from tunneld.wire.proxy_protocol import COMMON_V2, missing_v2

if TYPE_CHECKING:
    from tunneld.agent.keyed import KeyedPool


class Door:
    """The user of a duct until its PROXY header is whole."""

    def __init__(
        self, duct: Duct, take: Callable[[Duct, bytes], None], lost: Callable[[str], None], failed: Failure
    ) -> None:
        """`take` gets the duct and the header; `lost` hears why there is none."""
        self.failed = failed
        self._duct = duct
        self._take = take
        self._lost = lost
        self._head = b""

    def receive(self, data: memoryview) -> int:
        """Take the header, and not an octet more."""
        taken = 0
        try:
            while missing := missing_v2(self._head) if self._head else COMMON_V2:
                part = bytes(data[taken : taken + missing])
                if not part:
                    return taken
                self._head += part
                taken += len(part)
        except RemoteProtocolError as error:
            self._give_up(str(error))
            return taken
        self._duct.user = UNUSED
        self._take(self._duct, self._head)
        return taken

    def finished(self) -> None:
        """The end instead of a header."""
        self._give_up("connection closed by the relay")

    def resume(self) -> None:
        """We say nothing."""

    def broken(self, error: OSError) -> None:
        """The visitor, or the relay, is gone."""
        self._lost(reason_of(error))

    def _give_up(self, reason: str) -> None:
        self._duct.reset("no PROXY header")
        self._lost(reason)


class DuctWay:
    """See `Way`."""

    __slots__ = ("_duct",)

    def __init__(self, duct: Duct) -> None:
        self._duct = duct

    def join(self, server: socket.socket, *, linger: float, on_end: Callable[[Relay, RelayEnd], None]) -> Relay:
        """The local server's socket is the server's side."""
        return self._duct.join(server, linger=linger, on_end=on_end, side=Side.SERVER)

    def stream(self) -> trio.abc.HalfCloseableStream:
        """The duct as a stream."""
        return ChannelStream(self._duct)

    def close(self, reason: str) -> None:
        """The relay hears why, where there is a way to say it."""
        self._duct.reset(reason)


class TlsParked:
    """A connection in TLS that the relay has parked. See `Parked`."""

    def __init__(self, pool: KeyedPool, tls: TlsSocket, ahead: bytes, handle: Parked) -> None:
        """`ahead` was read already; `handle` is what the pool knows it by. Raises OSError."""
        self._pool = pool
        self._handle = handle
        self._duct = TlsDuct(cast(Pump, pool.engine), tls)
        self._duct.put_back(ahead)
        try:
            self._duct.start()
        except OSError:
            tls.close()
            raise
        self._duct.user = Door(self._duct, self._came, lambda reason: pool.lost(handle, reason), pool.owner.failed)
        self._duct.offer()

    def look(self) -> None:
        """The pump looks by itself."""

    def close(self) -> None:
        """See `Parked`."""
        self._duct.close()

    def _came(self, duct: Duct, header: bytes) -> None:
        if self._pool.flags:
            duct.put_back(header)
        self._pool.came(self._handle, DuctWay(duct), header)
