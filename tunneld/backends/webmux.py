"""The WebMUX backend: one connection from the hidden server carries all of its visitors.

    Endpoints                       the shared port's book: which server side has which key
    └─ WebMux ×tunnel               a server URI with a key; its carriers, the least loaded of which takes a visitor
       └─ Carrier ×N                a connection that the hidden server made; see session/

The hidden server connects to the shared port and says by InternAtom and DefineEndpoint (draft-gettys-webmux-00) that it
is to be called back as the server URI, key included: who knows the key is the hidden server. From then on we open a
session for each visitor, with the client side's port as the protocol id.

A hidden server that lost its network comes back before its old carrier is known to be dead. So a newcomer casts doubt
on the others: they are asked for a sign of life, and until they give one, visitors go to those that have.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import trio

from tunneld.backends.base import Host, Premises
from tunneld.endpoint import Endpoint, contains
from tunneld.errors import LimitReachedError, NotAllowedError, UsageError
from tunneld.options import TunnelOptions
from tunneld.session import Carrier, Channel

PLAIN, SECURE = "webmux", "webmuxs"
"""The schemes of server URIs."""
KEY_OCTETS = 18
"""Of randomness, 24 characters: nobody guesses one."""


class Endpoints:
    """Who is behind the shared port. `max_carriers` says how many a tunnel may have at once."""

    def __init__(self, max_carriers: Callable[[], int]) -> None:
        self.scheme = PLAIN
        self.port = 0  # of the shared listener; 0: there is none
        self.max_carriers = max_carriers
        self._sides: dict[str, WebMux] = {}  # by key

    def listen(self, port: int, *, secure: bool) -> None:
        """Where the shared port is from now on; the server URIs of all tunnels follow. 0: there is none any more."""
        self.port, self.scheme = port, SECURE if secure else PLAIN

    def enter(self, side: WebMux, key: str = "") -> str:
        """The key of a new server side: the `key` it had before if nobody has that."""
        if not key or key in self._sides:
            key = secrets.token_urlsafe(KEY_OCTETS)
        self._sides[key] = side
        return key

    def leave(self, key: str) -> None:
        """A server side has closed. Harmless when repeated."""
        self._sides.pop(key, None)

    def find(self, uri: str | None) -> WebMux:
        """Who is called back as this URI. Only the key counts: the relay's name may differ from where it is seen.

        Raises `NotAllowedError`, which does not tell a wrong key from one that is no more.
        """
        try:
            key = Endpoint.parse(uri or "").key
        except UsageError:
            key = ""
        side = self._sides.get(key)
        if side is None:
            raise NotAllowedError("no open tunnel has the server URI that it defines")
        return side


class WebMux:
    """The carriers of one tunnel. See `ServerSide`."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._endpoints = self._port(host.premises.endpoints)
        self._key = self._endpoints.enter(self, host.former.key if host.former else "")
        self._carriers: dict[Carrier, Any] = {}  # each with its peer's address
        self._waiters: deque[_Waiter] = deque()
        self._closed = False

    @classmethod
    def check(cls, premises: Premises, options: TunnelOptions) -> None:
        """See `Backend`."""
        port = cls._port(premises.endpoints)
        if options.secure == "yes" and port.scheme != SECURE:
            raise UsageError("option secure=yes: this relay has no certificate ([control.tls])")

    @classmethod
    def hides_key(cls, premises: Premises, _options: TunnelOptions) -> bool:
        """See `Backend`."""
        return cls._port(premises.endpoints).scheme == SECURE

    @staticmethod
    def _port(endpoints: Endpoints | None) -> Endpoints:
        if endpoints is None or not endpoints.port:
            raise UsageError("this relay has no port for the webmux backend: enable [webmux] there, or use tcp")
        return endpoints

    @property
    def uri(self) -> Endpoint:
        """`webmux://HOST:PORT/KEY`, or `webmuxs://` where the shared port speaks TLS."""
        return Endpoint(self._endpoints.scheme, self._host.advertised_host, self._endpoints.port, self._key)

    @property
    def parked(self) -> int:
        """How many more visitors the carriers could take."""
        return sum(carrier.room_left for carrier in self._carriers)

    def dial_nowait(self) -> Channel:
        """A channel on the least loaded carrier. Raises `trio.WouldBlock`."""
        if self._waiters:
            raise trio.WouldBlock
        return self._open()

    async def dial(self) -> Channel:
        """Wait in line for a carrier that has room. Raises `trio.ClosedResourceError` once closed."""
        if not self._waiters:
            try:
                return self._open()
            except trio.WouldBlock:
                pass
        waiter = _Waiter()
        self._waiters.append(waiter)
        try:
            await waiter.served.wait()
        except trio.Cancelled:
            if waiter.channel is None:
                self._waiters.remove(waiter)
            else:
                waiter.channel.close()
            raise
        if waiter.channel is None:
            raise trio.ClosedResourceError
        return waiter.channel

    def trim(self, keep: int) -> int:
        """Nothing is parked ahead, so there is nothing to trim."""
        return 0

    def close(self) -> None:
        """Take no carriers; end those that carry nobody, and each other one with its last visitor. Harmless when
        repeated.
        """
        self._closed = True
        self._endpoints.leave(self._key)
        self._close_idle()
        while self._waiters:
            self._waiters.popleft().served.set()

    def admit(self, carrier: Carrier, peer: Any) -> None:
        """Take a carrier whose peer has defined our URI, or raise `NotAllowedError` or `LimitReachedError`."""
        if self._host.admits is not None and not contains(self._host.admits, peer):
            raise NotAllowedError(f"only {self._host.admits} may connect as the hidden server")
        most = min(self._host.room(), self._endpoints.max_carriers())
        if len(self._carriers) >= most and not self._replace_silent():
            raise LimitReachedError(f"the tunnel has {len(self._carriers)} carriers already (webmux.max_carriers)")
        for other in self._carriers:
            other.heartbeat.ask_now()
        self._carriers[carrier] = peer
        self._host.attached(peer)
        self.freed()

    # What its carriers report

    def freed(self) -> None:
        """There may be room: serve whoever waits longest."""
        if self._closed:
            self._close_idle()
        while self._waiters:
            try:
                channel = self._open()
            except trio.WouldBlock:
                return
            self._waiters.popleft().serve(channel)

    def lost(self, carrier: Carrier) -> None:
        """A carrier ended."""
        peer = self._carriers.pop(carrier, None)
        if peer is not None:
            self._host.detached(peer)

    # Inside

    def _close_idle(self) -> None:
        for carrier in list(self._carriers):
            if not carrier.channels:
                carrier.close("the tunnel closed")

    def _open(self) -> Channel:
        carrier = _least_loaded(self._carriers)
        if carrier is None:
            raise trio.WouldBlock
        return carrier.open(self._host.client_port)

    def _replace_silent(self) -> bool:
        """Make room by giving up a carrier whose peer does not answer; whether there was one."""
        for carrier in self._carriers:
            if not carrier.answering:
                carrier.close("another one came while it did not answer")
                return True
        return False


class _Waiter:
    """Somebody in line for a channel."""

    __slots__ = ("channel", "served")

    def __init__(self) -> None:
        self.served = trio.Event()
        self.channel: Channel | None = None

    def serve(self, channel: Channel) -> None:
        self.channel = channel
        self.served.set()


def _least_loaded(carriers: Iterable[Carrier]) -> Carrier | None:
    """The carrier that a new visitor goes to: one that answers, then one with fewer channels, then the newest."""
    best: Carrier | None = None
    for carrier in carriers:
        if carrier.can_open and (best is None or _rank(carrier) <= _rank(best)):
            best = carrier
    return best


def _rank(carrier: Carrier) -> tuple[bool, bool, int]:
    return not carrier.answering, carrier.heartbeat.asking and not carrier.heartbeat.heard, len(carrier.channels)
