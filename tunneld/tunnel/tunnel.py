"""One tunnel: its nursery, its phase, its two sides.

    tunnel                     cancelling it drops exactly what hangs below
    ├─ server side             the backend: its listener and what is parked, or its carriers
    ├─ client side             a listener; its visitors arrive in batches, in the engine
    │  └─ waiting visitor ×N   a task each, but only for those that find no server connection parked
    ├─ relay ×M                without a task: the engine moves their bytes, the tunnel drops them when it ends
    └─ clock ×3                open_timeout, ttl, idle_timeout

Phases move one way, by `_enter` alone:

    OPENING ──► WAITING ◄──► READY        both sides listen; READY while a hidden server is connected, and answers
                   └────┬──────┘
                        ▼
                    DRAINING ──► CLOSED   DRAINING: nobody new, the relays finish

A one-shot tunnel (the reference semantics) pairs one server connection with one visitor and closes when either side
does. A persistent one outlives its relays.
"""

from __future__ import annotations

import socket
from collections import Counter
from enum import Enum
from typing import Any

import structlog
import trio

from tunneld.access import least
from tunneld.admission import Refusal, Refused
from tunneld.backends import Host, ServerConnection, backend_of
from tunneld.endpoint import Endpoint, format_peer
from tunneld.errors import reason_of
from tunneld.events import Events
from tunneld.rates import Rate, Thinning
from tunneld.relay.engine import Engine, Relay, RelayEnd
from tunneld.tunnel import clocks
from tunneld.tunnel.client_side import ClientSide
from tunneld.tunnel.legacy import Account, TunnelLegacy
from tunneld.tunnel.members import Members
from tunneld.tunnel.opening import Opening
from tunneld.wire.proxy_protocol import encode_v1, encode_v2

PROXY_HEADERS = {"v1": encode_v1, "v2": encode_v2}
STOPPED = "the relay stopped"
"""The reason where nobody gave one: its task was cancelled with all others."""
REFUSALS_LOGGED = Rate.parse("60/m")
"""Lines about refused connections of one tunnel: as many at once show what goes on, one a second that it still does."""


class Phase(Enum):
    """What a tunnel is doing."""

    OPENING = "opening"
    WAITING = "waiting"
    READY = "ready"
    DRAINING = "draining"
    CLOSED = "closed"


class Tunnel:
    """A client side, a server side and the relays between them."""

    def __init__(self, opening: Opening, engine: Engine, events: Events, legacy: TunnelLegacy | None = None) -> None:
        """Bind both sides; or take over the `legacy` of another process, and go on as if nothing had happened.

        Raises `ListenError`, `LimitReachedError`, `ShortageError` or `UsageError`, and holds nothing then.
        """
        backend = backend_of(opening.backend)
        account, now = legacy.account if legacy is not None else Account(), trio.current_time()
        self.opening = opening
        self._phase = Phase.OPENING
        self.opened_at, self.unused_since = now - account.age, now - account.unused
        self.quiet = account.quiet
        self.served = account.served  # visitors that got a server connection, ever
        self.refusals = Counter({Refused(kind): count for kind, count in account.refused.items()})
        self.max_visitors = opening.options.max_visitors or opening.settings.max_visitors
        self.bandwidth = least(opening.options.bandwidth, opening.settings.bandwidth)  # octets per second
        self.quota = least(opening.options.quota, opening.settings.quota)  # octets
        self.reason = ""  # why it closed
        self.members = Members(opening.admits)
        self._engine = engine
        self._events = events
        self._log = structlog.get_logger("tunnel").bind(tunnel=opening.id)
        self._thinning = Thinning(REFUSALS_LOGGED)
        self._relays: dict[Relay, Any] = {}  # each with its visitor's address
        self._ended_up, self._ended_down = account.up, account.down  # octets of relays that ended
        quota = self.quota if account.quota_left is None else account.quota_left
        self._throttle = engine.limit(self.bandwidth, quota, self._use_up) if self.bandwidth or self.quota else None
        self._legacy = legacy
        self._left_to_another = False
        self._scope = trio.CancelScope()
        self._closed = trio.Event()
        client = legacy.client if legacy is not None else None
        self._client_side = ClientSide(
            opening.settings, opening.options, opening.advertised_host, opening.reserved, client
        )
        self.rules, self._admission = self._client_side.rules, self._client_side.admission
        try:
            self._server_side = backend(self._host())
        except BaseException:
            self._client_side.close()
            raise

    # What can be asked of it

    @property
    def id(self) -> str:
        """A short name, unique in this process."""
        return self.opening.id

    @property
    def phase(self) -> Phase:
        """What it is doing. A hidden server that is connected and does not answer makes nothing ready."""
        return Phase.WAITING if self._phase is Phase.READY and self._server_side.silent else self._phase

    @property
    def server_uri(self) -> Endpoint:
        """Where the hidden server connects to: what openTunnel returns."""
        return self._server_side.uri

    @property
    def client_uri(self) -> Endpoint:
        """Where clients connect to: what getTunnelAddress returns."""
        return self._client_side.uri

    @property
    def visitors(self) -> dict[Relay, Any]:
        """The relays there are now, each with its visitor's address."""
        return self._relays

    @property
    def waiting(self) -> int:
        """Visitors that wait for a server connection."""
        return self._client_side.waiting

    @property
    def parked(self) -> int:
        """Server connections that wait for a visitor."""
        return self._server_side.parked

    @property
    def octets(self) -> tuple[int, int]:
        """Octets delivered so far: up (to the hidden server), down (to clients)."""
        up = self._ended_up + sum(relay.up for relay in self._relays)
        return up, self._ended_down + sum(relay.down for relay in self._relays)

    @property
    def in_use(self) -> bool:
        """Whether anybody is connected on either side."""
        return bool(self._relays or self.waiting or self.parked)

    @property
    def activity(self) -> object:
        """Something that differs whenever a byte moved or a visitor came."""
        return self.octets, self.served

    # What can be done to it

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until closed. An exception out of here is a bug; both sides and all relays are gone all the same."""
        options, settings = self.opening.options, self.opening.settings
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    self._client_side.listen(self._engine, self._server_side, self, nursery)
                    self._enter(Phase.READY if self.parked else Phase.WAITING)
                    if self._legacy is not None:
                        self._take_over(self._legacy)
                    nursery.start_soon(clocks.close_when_unused, self, options.open_timeout or settings.open_timeout)
                    if options.ttl is not None:
                        nursery.start_soon(clocks.close_after, self, options.ttl)
                    if options.idle_timeout is not None:
                        nursery.start_soon(clocks.close_when_idle, self, options.idle_timeout)
                    task_status.started()
        finally:
            self._stop()

    def close(self, reason: str) -> None:
        """Stop now: every connection drops. The first reason given is the one that is told."""
        self.reason = self.reason or reason
        self._scope.cancel()

    def drain(self) -> None:
        """Take nobody new, close when the last relay has ended. Visitors that still wait are given up."""
        if self._phase in {Phase.DRAINING, Phase.CLOSED}:
            return
        self._enter(Phase.DRAINING)
        self._client_side.close()
        self._server_side.close()
        self._events.publish("draining", id=self.id, visitors=len(self._relays))
        self._log.info("tunnel draining", visitors=len(self._relays))
        if not self._relays:
            self.close("drained")

    def pause(self) -> None:
        """Accept nobody on either side for now; connections stand in the listeners' queues. For `leave`."""
        self._client_side.pause()
        self._server_side.pause()

    def leave(self) -> TunnelLegacy:
        """Let go of everything that a successor can go on with, and end the rest: webmux, whose state is in this
        process. The tunnel is over then, here, and tells nobody.
        """
        self._left_to_another = True
        self.reason = STOPPED  # here; its address stays its own
        now = trio.current_time()
        relays, self._relays = self._relays, {}
        lifted = []
        for relay, peer in relays.items():
            if (taken := self._engine.lift(relay)) is not None:
                lifted.append((taken, peer))
            else:
                self._ended_up, self._ended_down = self._ended_up + relay.up, self._ended_down + relay.down
        account = Account(
            age=now - self.opened_at,
            unused=now - self.unused_since,
            quiet=self.quiet,
            served=self.served,
            refused={kind.value: count for kind, count in self.refusals.items()},
            up=self._ended_up,
            down=self._ended_down,
            quota_left=self._throttle.left if self._throttle is not None else None,
        )
        client, server = self._client_side.leave(), self._server_side.leave()
        draining, cut = self._phase is Phase.DRAINING, len(relays) - len(lifted)
        legacy = TunnelLegacy(self.opening, draining, account, client, server, lifted, cut)
        self._scope.cancel()
        return legacy

    def dismiss(self, member: str) -> bool:
        """An agent wants no more visitors. Drain unless others serve it; tells whether that is so."""
        self.members.part(member)
        alone = not self.members and not self._server_side.standing
        if alone or not self.opening.options.share:
            self.drain()
        return self._phase in {Phase.DRAINING, Phase.CLOSED}

    def trim(self, keep: int) -> int:
        """Close surplus parked server connections; see `ServerSide.trim`."""
        return self._server_side.trim(keep)

    def fail(self, error: Exception) -> None:
        """A bug in one of this tunnel's callbacks: log it once, close this tunnel, leave the others alone."""
        self._log.error("tunnel failed", exc_info=error)
        self.close("internal error")

    async def wait_closed(self) -> None:
        """Wait until both listeners and all connections are gone."""
        await self._closed.wait()

    # What its server side reports

    def _host(self) -> Host:
        return Host(
            engine=self._engine,
            settings=self.opening.settings,
            advertised_host=self.opening.advertised_host,
            client_port=self.client_uri.port,
            premises=self.opening.premises,
            secure=self.opening.options.secure,
            former=self.opening.former,
            reserved=self.opening.reserved,
            stranger=self.members.stranger,
            room=self._room,
            attached=self._attached,
            detached=self._detached,
            refused=lambda peer, reason: self._turned_away("server", peer, reason),
            failed=self.fail,
            legacy=self._legacy.server if self._legacy is not None else None,
        )

    def _room(self) -> int:
        if self.opening.options.persist:
            return self.opening.settings.max_parked
        return 0 if self.served else 1

    def _attached(self, peer: Any) -> None:
        if self._phase is Phase.WAITING:
            self._enter(Phase.READY)
        if self._events.watched:
            self._events.publish("attached", id=self.id, **{"from": format_peer(peer)})

    def _detached(self, peer: Any) -> None:
        if self._events.watched:
            self._events.publish("detached", id=self.id, **{"from": format_peer(peer)})
        self._one_less("the hidden server left before a visitor came")

    # What its client side reports

    def full(self) -> Refusal | None:
        """Why no further visitor is taken, if so."""
        settings = self.opening.settings
        if not self.opening.options.persist and (self.served or self.waiting):
            return Refusal(Refused.FULL, "a one-shot tunnel serves one visitor")
        if len(self._relays) >= self.max_visitors:
            return Refusal(Refused.FULL, f"{self.max_visitors} visitors are relayed already (max_visitors)")
        if self.waiting >= settings.max_waiting:
            return Refusal(Refused.FULL, f"{settings.max_waiting} visitors wait already (tunnels.max_waiting)")
        return None

    def refused(self, peer: Any, refusal: Refusal) -> None:
        """A visitor was turned away and closed: count it."""
        self.refusals[refusal.kind] += 1
        self._turned_away("client", peer, refusal.reason)

    def gave_up(self, peer: Any, reason: str) -> None:
        """A visitor found no server connection and was closed."""
        if self._admission is not None:
            self._admission.left(peer[0])
        self.refused(peer, Refusal(Refused.UNSERVED, reason))
        self._one_less(f"its visitor was given up: {reason}")

    def pair(self, visitor: socket.socket, server: ServerConnection, peer: Any, reached: Any = None) -> None:
        """Relay between a visitor and a server connection, both ours from now on; see `Pairing.pair`."""
        options = self.opening.options
        server.introduce(None if options.hide_visitor else peer)
        if options.proxy_protocol:
            try:
                server.send(PROXY_HEADERS[options.proxy_protocol](peer, reached or visitor.getsockname()))
            except OSError as error:
                visitor.close()
                server.close()
                self.gave_up(peer, f"its server connection broke: {reason_of(error)}")
                return
        self.served += 1
        linger = options.linger or self.opening.settings.linger
        self._relays[server.join(visitor, linger=linger, on_end=self._left, throttle=self._throttle)] = peer
        if self._events.watched:
            self._events.publish("visitor", id=self.id, **{"from": format_peer(peer)})

    # What its relays report

    def _use_up(self) -> None:
        self.close(f"its quota of {self.quota} octets is used up (quota)")

    def _left(self, relay: Relay, end: RelayEnd) -> None:
        """A relay ended."""
        if self._left_to_another:
            return
        peer = self._relays.pop(relay)
        if self._admission is not None:
            self._admission.left(peer[0])
        self._ended_up += relay.up
        self._ended_down += relay.down
        if self._phase is Phase.CLOSED:
            return  # dropped with the tunnel, which has told its end already
        if self._events.watched:
            self._events.publish(
                "left", id=self.id, up=relay.up, down=relay.down, reason=str(end), **{"from": format_peer(peer)}
            )
        self._one_less("" if self.opening.options.persist else str(end))

    def _one_less(self, reason: str) -> None:
        """Somebody went: what does that mean for the tunnel? `reason` is told where a one-shot one closes of it."""
        if not self.opening.options.persist:
            self.close(reason)
        elif not self._relays:
            self.unused_since = trio.current_time()
            if self._phase is Phase.DRAINING:
                self.close("drained")
            elif self._phase is Phase.READY and not self.parked:
                self._enter(Phase.WAITING)

    def _turned_away(self, side: str, peer: Any, reason: str) -> None:
        """Say why; the log hears of a flood, and is not flooded."""
        if self._events.watched:
            self._events.publish("refused", id=self.id, side=side, reason=reason, **{"from": format_peer(peer)})
        if (left_out := self._thinning.passes(trio.current_time())) is not None:
            self._log.info("connection refused", side=side, peer=format_peer(peer), reason=reason, left_out=left_out)

    # The beginning, where another process had one before, and the end

    def _take_over(self, legacy: TunnelLegacy) -> None:
        """Go on with the relays, and with a drain."""
        self._legacy = None
        for lifted, peer in legacy.relays:
            if self._admission is not None:
                self._admission.count_in(peer[0])
            self._relays[self._engine.put_down(lifted, on_end=self._left, throttle=self._throttle)] = peer
        for waiting in legacy.client.waiting:
            if self._admission is not None:
                self._admission.count_in(waiting.peer[0])
        if self._relays and self._phase is Phase.WAITING:
            self._enter(Phase.READY)
        if legacy.draining:
            self.drain()
        elif self.served and not self.opening.options.persist and not self._relays:
            self.close("its relay could not go along when the daemon started again")

    def _enter(self, phase: Phase) -> None:
        self._log.debug("phase", was=self._phase.value, now=phase.value)
        self._phase = phase

    def _stop(self) -> None:
        """Both listeners gone, every connection dropped, everybody told."""
        self._enter(Phase.CLOSED)
        self.reason = self.reason or STOPPED
        self._client_side.close()
        self._server_side.close()
        for relay in list(self._relays):
            relay.drop()
        if self._left_to_another:
            self._closed.set()
            return
        up, down = self.octets
        self._events.publish("closed", id=self.id, reason=self.reason, visitors=self.served, up=up, down=down)
        refused = self.refusals.total()
        self._log.info("tunnel closed", reason=self.reason, visitors=self.served, refused=refused, up=up, down=down)
        self._closed.set()
