"""The visitors of one tunnel: who may come, who is relayed, and what was moved for those that were.

    admit ──► pair ──► relayed ──► left         counted in, joined, counted out
      │         │
      ▼         ▼
    refused   gave_up                           closed

All of it runs inside the engine's callbacks, some ten thousand times a second: what is the same for every visitor is in
the tunnel's `EffectiveLimits`.

Who was turned away from one tunnel: counted, told to whoever watches, and logged as far as a flood lets.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import structlog
import trio

from tunneld.engine.engine import Engine, Relay, RelayEnd
from tunneld.engine.handover import RelayState
from tunneld.errors import reason_of
from tunneld.net.endpoint import format_peer
from tunneld.policy.admission import Admission, AdmissionRefusal, RefusalKind
from tunneld.policy.rates import LogLimiter, Rate
from tunneld.tunnel.events import Events
from tunneld.tunnel.limits import EffectiveLimits
from tunneld.tunnel.server_side import ServerConnection
from tunneld.tunnel.snapshot import TunnelCounters


class VisitorEvents(Protocol):
    """What visitors tell their tunnel."""

    def on_visitor_left(self, reason: str) -> None:
        """Somebody went, or waited in vain; `reason` is why a one-shot tunnel closes of it."""

    def close(self, reason: str) -> None:
        """Stop now."""


class VisitorRelays:
    """Those of one tunnel. `len` counts those that are relayed."""

    def __init__(
        self,
        tunnel: str,
        terms: EffectiveLimits,
        engine: Engine,
        events: Events,
        refusals: RefusalLog,
        owner: VisitorEvents,
        past: TunnelCounters,
    ) -> None:
        """`tunnel` is its id; `past` is what another process has counted of it."""
        self.relays: dict[Relay, Any] = {}  # each with its visitor's address
        self.served = past.served  # that got a server connection, ever
        self._tunnel = tunnel
        self._terms = terms
        self._engine = engine
        self._events = events
        self._refusals = refusals
        self._owner = owner
        self._admission = None if terms.rules.ask_nothing else Admission(terms.rules)
        self._ended_up, self._ended_down = past.up, past.down  # octets of relays that ended
        quota = terms.quota if past.quota_left is None else past.quota_left
        limited = terms.bandwidth or terms.quota
        self._throttle = engine.limit(terms.bandwidth, quota, self._use_up) if limited else None
        self._dropped = False

    def __len__(self) -> int:
        return len(self.relays)

    @property
    def octets(self) -> tuple[int, int]:
        """Octets delivered so far: up (to the hidden server), down (to clients)."""
        up = self._ended_up + sum(relay.up for relay in self.relays)
        return up, self._ended_down + sum(relay.down for relay in self.relays)

    @property
    def quota_left(self) -> int | None:
        """Octets that may still be moved; None: as many as they like."""
        return None if self._throttle is None else self._throttle.left

    # One after another

    def admit(self, peer: Any, waiting: int) -> AdmissionRefusal | None:
        """Count a visitor in, or say why not, while so many wait already."""
        terms = self._terms
        if not terms.persist and (self.served or waiting):
            return AdmissionRefusal(RefusalKind.FULL, "a one-shot tunnel serves one visitor")
        if len(self.relays) >= terms.max_visitors:
            return AdmissionRefusal(
                RefusalKind.FULL, f"{terms.max_visitors} visitors are relayed already (max_visitors)"
            )
        if waiting >= terms.max_waiting:
            return AdmissionRefusal(
                RefusalKind.FULL, f"{terms.max_waiting} visitors wait already (tunnels.max_waiting)"
            )
        return None if self._admission is None else self._admission.admit(peer[0], trio.current_time())

    def relay(self, visitor: socket.socket, server: ServerConnection, peer: Any, reached: Any) -> None:
        """Relay between a visitor that was admitted and a server connection; both belong to the relay from now on.

        `reached` is the address that the visitor connected to; None: its socket knows.
        """
        terms = self._terms
        server.set_originator(None if terms.hide_visitor else peer)
        if terms.proxy_header is not None:
            try:
                server.send(terms.proxy_header(peer, reached or visitor.getsockname()))
            except OSError as error:
                visitor.close()
                server.close()
                self.pairing_failed(peer, f"its server connection broke: {reason_of(error)}")
                return
        self.served += 1
        relay = server.join(visitor, linger=terms.linger, on_end=self._left, throttle=self._throttle)
        self.relays[relay] = peer
        if self._events.watched:
            self._events.publish("visitor", id=self._tunnel, **{"from": format_peer(peer)})

    def refused(self, peer: Any, refusal: AdmissionRefusal) -> None:
        """A visitor was not admitted and was closed."""
        self._refusals.visitor(peer, refusal)

    def pairing_failed(self, peer: Any, reason: str) -> None:
        """A visitor that was admitted found no server connection and was closed."""
        if self._admission is not None:
            self._admission.left(peer[0])
        self._refusals.visitor(peer, AdmissionRefusal(RefusalKind.UNSERVED, reason))
        self._owner.on_visitor_left(f"its visitor was given up: {reason}")

    def _left(self, relay: Relay, end: RelayEnd) -> None:
        """A relay ended."""
        peer = self.relays.pop(relay, None)
        if peer is None:  # it could not go along to another process, see `leave`
            return
        if self._admission is not None:
            self._admission.left(peer[0])
        self._ended_up += relay.up
        self._ended_down += relay.down
        if self._dropped:  # with the tunnel, which has told its end already
            return
        if self._events.watched:
            self._events.publish(
                "left", id=self._tunnel, up=relay.up, down=relay.down, reason=str(end), **{"from": format_peer(peer)}
            )
        self._owner.on_visitor_left("" if self._terms.persist else str(end))

    def _use_up(self) -> None:
        self._owner.close(f"its quota of {self._terms.quota} octets is used up (quota)")

    # All of them

    def drop(self) -> None:
        """The tunnel is over, and so are they."""
        self._dropped = True
        for relay in list(self.relays):
            relay.drop()

    def export(self) -> tuple[Sequence[tuple[RelayState, Any]], int]:
        """Let go of the relays that another process can go on with, each with its visitor's address; and how many there
        are beside them, whose octets are counted and whose ends are told to nobody.
        """
        relays, self.relays = self.relays, {}
        lifted = []
        for relay, peer in relays.items():
            if (taken := self._engine.export_relay(relay)) is not None:
                lifted.append((taken, peer))
            else:
                self._ended_up += relay.up
                self._ended_down += relay.down
        return lifted, len(relays) - len(lifted)

    def adopt(self, relays: Sequence[tuple[RelayState, Any]], waiting: Sequence[Any]) -> None:
        """Go on with relays that another process has left; those at these addresses wait."""
        for lifted, peer in relays:
            self.relays[self._engine.import_relay(lifted, on_end=self._left, throttle=self._throttle)] = peer
        if self._admission is not None:
            for peer in (*waiting, *(peer for _, peer in relays)):
                self._admission.count_in(peer[0])


REFUSALS_LOGGED = Rate.parse("60/m")
"""Lines about refused connections of one tunnel: as many at once show what goes on, one a second that it still does."""


class RefusalLog:
    """Those of one tunnel, on either side."""

    def __init__(self, tunnel: str, events: Events, before: Mapping[str, int]) -> None:
        """`tunnel` is its id; `before` is what another process has counted of it, by the names of `RefusalKind`."""
        self.visitors = Counter({RefusalKind(kind): count for kind, count in before.items()})
        self._tunnel = tunnel
        self._events = events
        self._log = structlog.get_logger("tunnel").bind(tunnel=tunnel)
        self._thinning = LogLimiter(REFUSALS_LOGGED)

    def visitor(self, peer: Any, refusal: AdmissionRefusal) -> None:
        """A visitor was closed."""
        self.visitors[refusal.kind] += 1
        self._tell("client", peer, refusal.reason)

    def server(self, peer: Any, reason: str) -> None:
        """Somebody who connected as the hidden server was closed."""
        self._tell("server", peer, reason)

    def _tell(self, side: str, peer: Any, reason: str) -> None:
        if self._events.watched:
            self._events.publish("refused", id=self._tunnel, side=side, reason=reason, **{"from": format_peer(peer)})
        if (left_out := self._thinning.passes(trio.current_time())) is not None:
            self._log.info("connection refused", side=side, peer=format_peer(peer), reason=reason, left_out=left_out)
