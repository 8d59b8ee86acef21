"""One tunnel: its nursery, its phase, its two sides.

    tunnel                     cancelling it drops exactly what hangs below
    ├─ server side             the backend: its listener and what is parked, or its carriers
    ├─ client side             a listener; its visitors arrive in batches, in the engine
    │  └─ waiting visitor ×N   a task each, but only for those that find no server connection parked
    ├─ visitors                those that are relayed, without a task: the engine moves their bytes
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

from collections import Counter
from enum import Enum
from typing import Any

import structlog
import trio

from tunneld.engine.engine import Engine
from tunneld.net.endpoint import Endpoint, format_peer
from tunneld.policy.admission import RefusalKind
from tunneld.tunnel import timeouts
from tunneld.tunnel.agents import TunnelAgents
from tunneld.tunnel.client_side import ClientSide
from tunneld.tunnel.events import Events
from tunneld.tunnel.limits import EffectiveLimits
from tunneld.tunnel.server_side import TunnelContext
from tunneld.tunnel.snapshot import TunnelCounters, TunnelSnapshot
from tunneld.tunnel.spec import TunnelSpec
from tunneld.tunnel.visitors import RefusalLog, VisitorRelays

STOPPED = "the relay stopped"
"""The reason where nobody gave one: its task was cancelled with all others."""


class Phase(Enum):
    """What a tunnel is doing."""

    OPENING = "opening"
    WAITING = "waiting"
    READY = "ready"
    DRAINING = "draining"
    CLOSED = "closed"


class Tunnel:
    """A client side, a server side and the relays between them."""

    def __init__(
        self, opening: TunnelSpec, engine: Engine, events: Events, legacy: TunnelSnapshot | None = None
    ) -> None:
        """Bind both sides; or take over the `legacy` of another process, and go on as if nothing had happened.

        Raises `ListenError`, `LimitReachedError`, `ShortageError` or `UsageError`, and holds nothing then.
        """
        backend, terms = (
            opening.services.backend(opening.backend),
            EffectiveLimits.of(opening.settings, opening.options),
        )
        account, now = legacy.counters if legacy is not None else TunnelCounters(), trio.current_time()
        self.spec = opening
        self.terms = terms
        self.opened_at, self.idle_since = now - account.age, now - account.idle
        self.idle_checks = account.quiet
        self.reason = ""  # why it closed
        self.agents = TunnelAgents(opening.allowed_sources)
        self._phase = Phase.OPENING
        self._engine = engine
        self._events = events
        self._log = structlog.get_logger("tunnel").bind(tunnel=opening.id)
        self._legacy = legacy
        self._left_to_another = False
        self._scope = trio.CancelScope()
        self._closed = trio.Event()
        self._refusals = RefusalLog(opening.id, events, account.refused)
        self.visitors = VisitorRelays(opening.id, terms, engine, events, self._refusals, self, account)
        self._client_side = ClientSide(opening, terms, legacy.client if legacy is not None else None)
        try:
            self._server_side = backend(self._host())
        except BaseException:
            self._client_side.close()
            raise

    # What can be asked of it

    @property
    def id(self) -> str:
        """A short name, unique in this process."""
        return self.spec.id

    @property
    def phase(self) -> Phase:
        """What it is doing. A hidden server that is connected and does not answer makes nothing ready."""
        return Phase.WAITING if self._phase is Phase.READY and self._server_side.unresponsive else self._phase

    @property
    def server_uri(self) -> Endpoint:
        """Where the hidden server connects to: what openTunnel returns."""
        return self._server_side.uri

    @property
    def client_uri(self) -> Endpoint:
        """Where clients connect to: what getTunnelAddress returns."""
        return self._client_side.uri

    @property
    def age(self) -> float:
        """Seconds since it was opened."""
        return trio.current_time() - self.opened_at

    @property
    def waiting(self) -> int:
        """Visitors that wait for a server connection."""
        return self._client_side.waiting

    @property
    def parked(self) -> int:
        """Server connections that wait for a visitor."""
        return self._server_side.parked

    @property
    def served(self) -> int:
        """Visitors that got a server connection, ever."""
        return self.visitors.served

    @property
    def refusals(self) -> Counter[RefusalKind]:
        """Visitors that were turned away, ever, by the class of the reason."""
        return self._refusals.visitors

    @property
    def octets(self) -> tuple[int, int]:
        """Octets delivered so far: up (to the hidden server), down (to clients)."""
        return self.visitors.octets

    @property
    def in_use(self) -> bool:
        """Whether anybody is connected on either side."""
        return bool(self.visitors or self.waiting or self.parked)

    @property
    def activity(self) -> object:
        """Something that differs whenever a byte moved or a visitor came."""
        return self.octets, self.served

    # What can be done to it

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until closed. An exception out of here is a bug; both sides and all relays are gone all the same."""
        options, settings = self.spec.options, self.spec.settings
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    self._client_side.listen(self._engine, self._server_side, self.visitors, nursery, self.fail)
                    self._enter(Phase.READY if self.parked else Phase.WAITING)
                    if self._legacy is not None:
                        self._take_over(self._legacy)
                    nursery.start_soon(timeouts.close_when_unused, self, options.open_timeout or settings.open_timeout)
                    if options.ttl is not None:
                        nursery.start_soon(timeouts.close_after, self, options.ttl)
                    if options.idle_timeout is not None:
                        nursery.start_soon(timeouts.close_when_idle, self, options.idle_timeout)
                    task_status.started()
        finally:
            self._stop()

    def close(self, reason: str) -> None:
        """Stop now: every connection drops. The first reason given is the one that is told."""
        self.reason = self.reason or reason
        self._scope.cancel()

    def drain(self, why: str = "") -> None:
        """Take nobody new, close when the last relay has ended. Visitors that still wait are given up.

        `why` is for the log.
        """
        if self._phase in {Phase.DRAINING, Phase.CLOSED}:
            return
        self._enter(Phase.DRAINING)
        self._client_side.close()
        self._server_side.close()
        self._events.publish("draining", id=self.id, visitors=len(self.visitors))
        self._log.info("tunnel draining", visitors=len(self.visitors), **({"reason": why} if why else {}))
        if not self.visitors:
            self.close("drained")

    def pause(self) -> None:
        """Accept nobody on either side for now; connections stand in the listeners' queues. For `leave`."""
        self._client_side.pause()
        self._server_side.pause()

    def export(self) -> TunnelSnapshot:
        """Let go of everything that a successor can go on with, and end the rest: webmux, whose state is in this
        process. The tunnel is over then, here, and tells nobody.
        """
        self._left_to_another = True
        self.reason = STOPPED  # here; its address stays its own
        now = trio.current_time()
        relays, cut = self.visitors.export()
        up, down = self.octets
        account = TunnelCounters(
            age=now - self.opened_at,
            idle=now - self.idle_since,
            quiet=self.idle_checks,
            served=self.served,
            refused={kind.value: count for kind, count in self.refusals.items()},
            up=up,
            down=down,
            quota_left=self.visitors.quota_left,
        )
        client, server = self._client_side.export(), self._server_side.export()
        legacy = TunnelSnapshot(self.spec, self._phase is Phase.DRAINING, account, client, server, relays, cut)
        self._scope.cancel()
        return legacy

    def dismiss(self, member: str) -> bool:
        """An agent wants no more visitors. Drain unless others serve it; tells whether that is so."""
        self.agents.leave(member)
        alone = not self.agents and not self._server_side.live_connections
        if alone or not self.spec.options.share:
            self.drain()
        return self._phase in {Phase.DRAINING, Phase.CLOSED}

    def trim(self, keep: int, host: str) -> int:
        """Close surplus parked server connections, see `ServerSide.trim`; none that another agent has made, as far as
        that can be told: whoever asks, from the address `host`, knows only what it needs itself.
        """
        return self._server_side.trim(keep, self.agents.elsewhere(host))

    def fail(self, error: Exception) -> None:
        """A bug in one of this tunnel's callbacks: log it once, close this tunnel, leave the others alone."""
        self._log.error("tunnel failed", exc_info=error)
        self.close("internal error")

    async def wait_closed(self) -> None:
        """Wait until both listeners and all connections are gone."""
        await self._closed.wait()

    # What its server side reports

    def _host(self) -> TunnelContext:
        return TunnelContext(
            engine=self._engine,
            settings=self.spec.settings,
            advertised_host=self.spec.advertised_host,
            client_port=self.client_uri.port,
            services=self.spec.services,
            secure=self.spec.options.secure,
            former=self.spec.former_uri,
            reserved=self.spec.reserved,
            why_not_allowed=self.agents.why_not_allowed,
            parking_capacity=self._room,
            on_attached=self._attached,
            on_detached=self._detached,
            on_refused=self._refusals.server,
            on_failure=self.fail,
            snapshot=self._legacy.server if self._legacy is not None else None,
        )

    def _room(self) -> int:
        if self.terms.persist:
            return self.spec.settings.max_parked
        return 0 if self.served else 1

    def _attached(self, peer: Any) -> None:
        if self._phase is Phase.WAITING:
            self._enter(Phase.READY)
        if self._events.watched:
            self._events.publish("attached", id=self.id, **{"from": format_peer(peer)})

    def _detached(self, peer: Any) -> None:
        if self._events.watched:
            self._events.publish("detached", id=self.id, **{"from": format_peer(peer)})
        self.on_visitor_left("the hidden server left before a visitor came")

    # What its visitors report

    def on_visitor_left(self, reason: str) -> None:
        """Somebody went: what does that mean for the tunnel? `reason` is told where a one-shot one closes of it."""
        if not self.terms.persist:
            self.close(reason)
        elif not self.visitors.relays:
            self.idle_since = trio.current_time()
            if self._phase is Phase.DRAINING:
                self.close("drained")
            elif self._phase is Phase.READY and not self.parked:
                self._enter(Phase.WAITING)

    # The beginning, where another process had one before, and the end

    def _take_over(self, legacy: TunnelSnapshot) -> None:
        """Go on with the relays, and with a drain."""
        self._legacy = None
        self.visitors.adopt(legacy.relays, [waiting.peer for waiting in legacy.client.waiting])
        if self.visitors and self._phase is Phase.WAITING:
            self._enter(Phase.READY)
        if legacy.draining:
            self.drain()
        elif self.served and not self.terms.persist and not self.visitors:
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
        self.visitors.drop()
        if self._left_to_another:
            self._closed.set()
            return
        up, down = self.octets
        self._events.publish("closed", id=self.id, reason=self.reason, visitors=self.served, up=up, down=down)
        refused = self.refusals.total()
        self._log.info("tunnel closed", reason=self.reason, visitors=self.served, refused=refused, up=up, down=down)
        self._closed.set()
