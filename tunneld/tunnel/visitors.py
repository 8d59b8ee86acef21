"""The visitors of one tunnel: accepted or refused, relayed, counted.

    admit ──► relay ──► relayed ──► left        counted in, joined, counted out
      │         │
      ▼         ▼
    refused   pairing_failed                    closed

All of it runs in callbacks of the engine, some ten thousand times a second; what is the same for every visitor is in
the tunnel's `EffectiveLimits`. Refusals are counted, published as events, and logged at a limited rate.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Protocol

import structlog
import trio

from tunneld.engine.engine import Cause, Engine, Limiter, Relay, RelayEnd
from tunneld.net.endpoint import Peer, format_peer
from tunneld.policy.admission import Admission, AdmissionRefusal, RefusalKind
from tunneld.policy.limits import EffectiveLimits
from tunneld.policy.rates import LogLimiter, Rate
from tunneld.tunnel.events import Events
from tunneld.tunnel.server_side import ServerConnection
from tunneld.tunnel.snapshot import RelaySnapshot, TunnelCounters
from tunneld.tunnel.spec import TunnelSpec
from tunneld.tunnel.visitor import RelayedVisitor, Visitor

STOPPED = "the relay stopped"
"""Why a visitor left, and a tunnel closed, where no other reason was given: everything is cancelled together."""

CUT_BY_RESTART = "its connection could not be kept across the restart"
"""Why a visitor left, and a one-shot tunnel closed."""

log = structlog.get_logger("tunnel")

MSG_MORE: Final = getattr(socket, "MSG_MORE", 0)
"""On Linux, where host names are: more follows, so this may wait for it."""


class VisitorEvents(Protocol):
    """What `VisitorRelays` calls: the tunnel."""

    def on_visitor_left(self, reason: str) -> None:
        """A visitor disconnected, or waited in vain. `reason` is the one with which a one-shot tunnel closes."""

    def expire(self, reason: str) -> None:
        """Close the tunnel now and for good."""


class VisitorRelays:
    """The relays of one tunnel's visitors. `len` is the number of relayed visitors."""

    def __init__(
        self,
        spec: TunnelSpec,
        limits: EffectiveLimits,
        engine: Engine,
        events: Events,
        refusals: RefusalLog,
        owner: VisitorEvents,
        counters: TunnelCounters,
    ) -> None:
        """`counters` come from the process that had the tunnel before."""
        self.relays: dict[Relay, RelayedVisitor] = {}
        self.served = counters.served  # visitors that got a server connection, since the tunnel was opened
        self._spec = spec
        self._tunnel = spec.id
        self._limits = limits
        self._tenant = spec.tenant
        self._engine = engine
        self._events = events
        self._refusals = refusals
        self._owner = owner
        self._admission = None if limits.rules.accept_all else Admission(limits.rules)
        self._ended_up, self._ended_down = counters.up, counters.down  # bytes of relays that have ended
        quota = limits.quota if counters.quota_left is None else counters.quota_left
        self._throttle: Limiter | None = self._new_throttle(quota)
        self._dropped = ""  # why all of them were dropped
        self._kicked: dict[Relay, str] = {}  # why each was kicked, until it has ended

    def __len__(self) -> int:
        return len(self.relays)

    @property
    def octets(self) -> tuple[int, int]:
        """Bytes delivered so far: up (to the hidden server), down (to clients)."""
        up = self._ended_up + sum(relay.up for relay in self.relays)
        return up, self._ended_down + sum(relay.down for relay in self.relays)

    @property
    def quota_left(self) -> int | None:
        """Bytes that may still be relayed; None: no limit."""
        return None if self._throttle is None else self._throttle.left

    # One visitor

    def admit(self, visitor: Visitor, waiting: int) -> AdmissionRefusal | None:
        """Accept a visitor and return None, or return why it is refused. `waiting` visitors have no server connection
        yet.
        """
        limits = self._limits
        if not limits.persist and (self.served or waiting):
            return AdmissionRefusal(RefusalKind.FULL, "a one-shot tunnel serves one visitor")
        if len(self.relays) >= limits.max_visitors:
            return AdmissionRefusal(
                RefusalKind.FULL, f"limit reached: {limits.max_visitors} visitors are connected (max_visitors)"
            )
        if waiting >= limits.max_waiting:
            return AdmissionRefusal(
                RefusalKind.FULL, f"limit reached: {limits.max_waiting} visitors are waiting (tunnels.max_waiting)"
            )
        tenant, refusal = self._tenant, None
        if tenant.bans.ends and tenant.bans.covers(visitor.peer[0], trio.current_time()):
            refusal = AdmissionRefusal(RefusalKind.ADDRESS, "its address is banned (tunnel bans)")
        elif tenant.visitors >= tenant.limits.visitors:
            refusal = tenant.refuse_visitor()
        elif self._admission is not None:
            refusal = self._admission.admit(visitor.peer[0], trio.current_time())
        if refusal is None:
            tenant.visitors += 1
        return refusal

    def relay(self, visitor: Visitor, server: ServerConnection) -> bool:
        """Relay between an accepted visitor and a server connection, and own both from now on. False: the server
        connection had failed already, and is closed; the visitor, from which nothing was read, is still the caller's.
        """
        limits, end, peer = self._limits, visitor.end, visitor.peer
        server.set_originator(None if limits.hide_visitor else peer)
        if limits.proxy_header is not None:
            header = limits.proxy_header(peer, visitor.reached or visitor.ask_reached())
            try:
                if visitor.host is not None and isinstance(far := server.end, socket.socket):
                    far.send(header, MSG_MORE)  # one packet with what the visitor has sent: it has its name from that
                else:
                    server.send(header)
            except OSError:
                server.close()
                return False
        self.served += 1
        visitor.greet()
        relay = self._engine.join(
            end,
            server.end,
            linger=limits.linger,
            on_end=self._on_relay_end,
            throttle=self._throttle,
            early=visitor.early,
        )
        reached = visitor.reached if self._events.recorder is None else visitor.find_reached()
        self.relays[relay] = RelayedVisitor(peer, trio.current_time(), reached, visitor.host, visitor.credential)
        if self._events.watched:
            self._events.publish("visitor", id=self._tunnel, **{"from": format_peer(peer)})
        else:
            self._events.unseen += 1
        return True

    def refused(self, visitor: Visitor, refusal: AdmissionRefusal) -> None:
        """A visitor was refused and closed."""
        self._refusals.visitor(visitor.peer, refusal)

    def pairing_failed(self, visitor: Visitor, refusal: AdmissionRefusal) -> None:
        """An accepted visitor got no server connection and was closed."""
        self._count_out(visitor.peer)
        self._refusals.visitor(visitor.peer, refusal)
        if (
            refusal.kind is not RefusalKind.DENIED or self._limits.persist
        ):  # else any client could end a one-shot tunnel
            self._owner.on_visitor_left(f"its visitor was not served: {refusal.reason}")

    def _count_out(self, peer: Peer) -> None:
        """An accepted visitor is gone."""
        self._tenant.visitors -= 1
        if self._admission is not None:
            self._admission.left(peer[0])

    def _on_relay_end(self, relay: Relay, end: RelayEnd) -> None:
        visitor = self.relays.pop(relay, None)
        if visitor is None:  # it could not be handed over to another process, see `export`
            return
        self._count_out(visitor.peer)
        self._ended_up += relay.up
        self._ended_down += relay.down
        reason = self._dropped or self._kicked.pop(relay, "") or (STOPPED if end.cause is Cause.DROPPED else str(end))
        if self._events.recorder is not None:
            self._events.recorder(self._spec, visitor, relay.up, relay.down, reason)
        if self._dropped:  # together with the tunnel; its `closed` event is out already
            return
        if self._events.watched:
            peer = format_peer(visitor.peer)
            self._events.publish("left", id=self._tunnel, up=relay.up, down=relay.down, reason=reason, **{"from": peer})
        else:
            self._events.unseen += 1
        self._owner.on_visitor_left("" if self._limits.persist else reason)

    def _on_quota_used_up(self) -> None:
        self._owner.expire(f"quota of {self._limits.quota} bytes is used up (quota)")

    def _new_throttle(self, quota: int | None) -> Limiter | None:
        """The throttle of all its relays; None where nothing limits them."""
        limits, bucket = self._limits, self._tenant.bucket
        if limits.bandwidth is None and limits.quota is None and bucket is None:
            return None
        return self._engine.limit(limits.bandwidth, quota, self._on_quota_used_up, bucket)

    # Several of them

    def change(self, spec: TunnelSpec, waiting: Sequence[Peer], quota_left: int | None) -> None:
        """Other limits hold from now on. Those about addresses and numbers do not end the connections of visitors that
        are there, of which `waiting` have no server connection yet. Bandwidth and quota hold for these, too, where
        there was one of both before.
        """
        self._spec, self._limits = spec, spec.limits
        self._admission = None if spec.limits.rules.accept_all else Admission(spec.limits.rules)
        self._count_in(waiting)
        if self._throttle is None:
            self._throttle = self._new_throttle(quota_left)
        else:
            self._throttle.change(spec.limits.bandwidth, quota_left)

    def _count_in(self, waiting: Sequence[Peer]) -> None:
        """Count all visitors that are there, which the admission has not seen."""
        if self._admission is not None:
            for peer in (*waiting, *[one.peer for one in self.relays.values()]):
                self._admission.count_in(peer[0])

    def kick(self, chosen: Callable[[Peer], bool], reason: str) -> int:
        """Cut the connections of the visitors with a chosen address; returns how many. `reason` is for the event."""
        relays = [relay for relay, visitor in self.relays.items() if chosen(visitor.peer)]
        for relay in relays:
            self._kicked[relay] = reason
            relay.drop()
        return len(relays)

    def drop(self, reason: str) -> None:
        """Drop all relays, because the tunnel has closed for this reason."""
        self._dropped = reason if reason == STOPPED else f"the tunnel closed: {reason}"
        for relay in list(self.relays):
            relay.drop()

    def export(self) -> tuple[Sequence[RelaySnapshot], int]:
        """Hand over the relays that another process can continue, and the number of the remaining ones. Their bytes are
        counted; their ends are not reported.
        """
        relays, self.relays = self.relays, {}
        exported, now = [], trio.current_time()
        for relay, one in relays.items():
            if (state := self._engine.export_relay(relay)) is not None:
                exported.append(RelaySnapshot(state, one.peer, now - one.since, one.reached, one.host, one.credential))
            else:
                self._ended_up += relay.up
                self._ended_down += relay.down
                if self._events.recorder is not None:
                    self._events.recorder(self._spec, one, relay.up, relay.down, CUT_BY_RESTART)
        return exported, len(relays) - len(exported)

    def adopt(self, relays: Sequence[RelaySnapshot], waiting: Sequence[Peer]) -> None:
        """Continue the relays of another process. `waiting` has the addresses of visitors that wait."""
        now = trio.current_time()
        for one in relays:
            relay = self._engine.import_relay(one.state, on_end=self._on_relay_end, throttle=self._throttle)
            self.relays[relay] = RelayedVisitor(one.peer, now - one.age, one.reached, one.host, one.credential)
        self._tenant.visitors += len(relays) + len(waiting)
        self._count_in(waiting)


REFUSAL_LOG_RATE = Rate.parse("60/m")
"""Log lines about refused connections of one tunnel: a burst shows what happens, one a second that it goes on."""


class RefusalLog:
    """Counts, publishes and logs the refused connections of one tunnel, on either side."""

    def __init__(self, tunnel: str, events: Events, counted: Mapping[str, int]) -> None:
        """`tunnel` is the tunnel's id; `counted` are the counts of the process that had the tunnel before, by the
        values of `RefusalKind`.
        """
        self.visitors = Counter({RefusalKind(kind): count for kind, count in counted.items()})
        self._tunnel = tunnel
        self._events = events
        self._limiter = LogLimiter(REFUSAL_LOG_RATE)

    def visitor(self, peer: Peer, refusal: AdmissionRefusal) -> None:
        """A visitor was refused and closed."""
        self.visitors[refusal.kind] += 1
        self._report("client", peer, refusal.reason)

    def server(self, peer: Peer, reason: str) -> None:
        """A peer that connected as the hidden server was refused and closed."""
        self._report("server", peer, reason)

    def _report(self, side: str, peer: Peer, reason: str) -> None:
        if self._events.watched:
            self._events.publish("refused", id=self._tunnel, side=side, reason=reason, **{"from": format_peer(peer)})
        else:
            self._events.unseen += 1
        if (left_out := self._limiter.passes(trio.current_time())) is not None:
            log.info(
                "connection refused",
                tunnel=self._tunnel,
                side=side,
                peer=format_peer(peer),
                reason=reason,
                left_out=left_out,
            )
