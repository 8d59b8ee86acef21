"""What all backends on carriers have in common: connections of the hidden server, each of which takes many visitors.

A visitor goes to the least loaded carrier that has room. A hidden server that lost its network comes back before its
old carrier is known to be dead. So a newcomer casts doubt on the others: they are asked for a sign of life, and until
they give one, visitors go to those that have.
"""

from __future__ import annotations

from collections.abc import Collection, Container
from contextlib import suppress
from typing import Any, ClassVar, Protocol

import trio

from tunneld.backends.queue import WaitQueue
from tunneld.errors import LimitReachedError, NotAllowedError, UsageError
from tunneld.mux.channel import Channel
from tunneld.mux.heartbeat import Heartbeat
from tunneld.net.endpoint import Endpoint
from tunneld.policy.options import TunnelOptions
from tunneld.tunnel.keys import KeyRegistry
from tunneld.tunnel.server_side import BackendServices, ServerSideSnapshot, TunnelContext

SECURE = frozenset({"webmuxs", "ssh"})
"""Schemes of ports to which the key crosses enciphered."""


class VisitorCarrier(Protocol):
    """A connection that carries channels: `session.Carrier`, or another that does the same."""

    @property
    def answering(self) -> bool:
        """Whether the peer has not fallen silent, as far as we know."""

    @property
    def channels_left(self) -> int:
        """How many channels could be opened, at least about."""

    @property
    def channels(self) -> Collection[int]:
        """Those there are."""

    @property
    def heartbeat(self) -> Heartbeat:
        """Is the peer alive?"""

    def open(self, protocol: int) -> Channel:
        """Open a channel for a visitor of this port. Raises `LimitReachedError` where there is no room for one."""

    def close(self, reason: str) -> None:
        """End it and every channel on it. Harmless when repeated."""


class MuxServerSide:
    """The carriers of one tunnel. See `ServerSide`."""

    backend: ClassVar[str]

    def __init__(self, host: TunnelContext) -> None:
        """Raises `UsageError` where the relay has no port for such carriers."""
        self._host = host
        self._endpoints = self._port(host.services)
        self._key = self._endpoints.register(self, _known_key(host))
        self._carriers: dict[VisitorCarrier, Any] = {}  # each with its peer's address
        self._taking: list[VisitorCarrier] = []  # those of them that take visitors; the newest before its equals
        self._line = WaitQueue[Channel]()
        self._closed = False

    @classmethod
    def check(cls, premises: BackendServices, options: TunnelOptions) -> None:
        """See `Backend`."""
        cls._port(premises)
        if options.secure == "yes" and not cls.is_encrypted(premises, options):
            raise UsageError("option secure=yes: this relay has no certificate ([control.tls])")

    @classmethod
    def is_encrypted(cls, premises: BackendServices, _options: TunnelOptions) -> bool:
        """See `Backend`."""
        return cls._port(premises).scheme(cls.backend) in SECURE

    @classmethod
    def _port(cls, premises: BackendServices) -> KeyRegistry:
        if premises.keys is None:
            raise UsageError(f"this relay has no {cls.backend} backend")
        premises.keys.check(cls.backend)
        return premises.keys

    @property
    def uri(self) -> Endpoint:
        """With the key by which the hidden server says that it is this one's."""
        return self._endpoints.uri(self.backend, self._host.advertised_host, self._key)

    @property
    def parked(self) -> int:
        """How many more visitors the carriers could take."""
        return sum(carrier.channels_left for carrier in self._taking)

    @property
    def live_connections(self) -> int:
        """How many carriers answer and take visitors."""
        return sum(carrier.answering for carrier in self._taking)

    @property
    def unresponsive(self) -> bool:
        """Whether there are carriers and none of them answers and takes visitors."""
        return bool(self._carriers) and not self.live_connections

    @property
    def key(self) -> str:
        """The key alone."""
        return self._key

    @property
    def carriers(self) -> Collection[VisitorCarrier]:
        """Those there are."""
        return self._carriers.keys()

    @property
    def client_port(self) -> int:
        """The port that visitors reach."""
        return self._host.client_port

    def dial_nowait(self) -> Channel:
        """A channel on the least loaded carrier. Raises `trio.WouldBlock`."""
        if self._line.waiters:
            raise trio.WouldBlock
        return self._open()

    async def dial(self) -> Channel:
        """Wait in line for a carrier that has room. Raises `trio.ClosedResourceError` once closed."""
        with suppress(trio.WouldBlock):
            return self.dial_nowait()
        return await self._line.wait()

    def trim(self, keep: int, spared: Container[str] = ()) -> int:
        """Nothing is parked ahead, so there is nothing to trim."""
        return 0

    def pause(self) -> None:
        """See `ServerSide`: the shared port's door does that."""

    def export(self) -> ServerSideSnapshot:
        """See `ServerSide`. What a carrier is about to say, and how it is enciphered, is in this process and cannot go
        along: the hidden server dials again, to the same address.
        """
        self._closed = True
        for carrier in list(self._carriers):
            carrier.close("the relay starts again")
        return ServerSideSnapshot(key=self._key)

    def close(self) -> None:
        """Take no carriers; end those that carry nobody, and each other one with its last visitor. Harmless when
        repeated.
        """
        self._closed = True
        self._endpoints.unregister(self, self._key)
        self._close_idle()
        self._line.close()

    def admit(self, carrier: VisitorCarrier, peer: Any, most: int) -> None:
        """Take a carrier whose peer has said our key, if that makes no more than `most`, or raise `NotAllowedError` or
        `LimitReachedError`.
        """
        if reason := self._host.why_not_allowed(peer):
            raise NotAllowedError(reason)
        if len(self._carriers) >= min(self._host.parking_capacity(), most) and not self._replace_silent():
            raise LimitReachedError(f"the tunnel has {len(self._carriers)} carriers already (max_carriers)")
        for other in list(self._carriers):  # asking may find that it is lost
            other.heartbeat.ping_now()
        self._carriers[carrier] = peer
        self._taking.insert(0, carrier)
        self._host.on_attached(peer)
        self.on_capacity()

    def retire(self, carrier: VisitorCarrier) -> None:
        """Its peer wants to be called no more: those that it serves may finish, others go elsewhere or wait."""
        if carrier in self._taking:
            self._taking.remove(carrier)

    # What its carriers report

    def on_capacity(self) -> None:
        """There may be room: serve whoever waits longest."""
        if self._closed:
            self._close_idle()
        while self._line.waiters:
            try:
                channel = self._open()
            except trio.WouldBlock:
                return
            self._line.serve(channel)

    def on_carrier_closed(self, carrier: VisitorCarrier) -> None:
        """A carrier ended."""
        self.retire(carrier)
        peer = self._carriers.pop(carrier, None)
        if peer is not None:
            self._host.on_detached(peer)

    # Inside

    def _close_idle(self) -> None:
        for carrier in list(self._carriers):
            if not carrier.channels:
                carrier.close("the tunnel closed")

    def _open(self) -> Channel:
        carriers = self._taking
        for carrier in carriers[:] if len(carriers) < 2 else sorted(carriers, key=_rank):
            try:
                return carrier.open(self._host.client_port)
            except LimitReachedError:
                pass
        raise trio.WouldBlock

    def _replace_silent(self) -> bool:
        """Make room by giving up a carrier whose peer does not answer; whether there was one."""
        for carrier in self._carriers:
            if not carrier.answering:
                carrier.close("another one came while it did not answer")
                return True
        return False


def _known_key(host: TunnelContext) -> str:
    """The key that a hidden server may know already."""
    if host.snapshot is not None:
        return host.snapshot.key
    return host.former.key if host.former is not None else ""


def _rank(carrier: VisitorCarrier) -> tuple[bool, bool, int]:
    """A new visitor goes to one that answers, then to one that nobody doubts, then to one with fewer channels."""
    return (
        not carrier.answering,
        carrier.heartbeat.awaiting_reply and not carrier.heartbeat.received,
        len(carrier.channels),
    )
