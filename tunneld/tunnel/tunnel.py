"""One tunnel: its nursery, its phase, its ingresses and its server side.

    tunnel                     cancelling it drops exactly what hangs below
    ├─ server side             of the backend: its listener and parked connections, or its carriers
    ├─ ingress ×1..n           where visitors come from; a port accepts them in batches, inside the engine
    ├─ waiting visitor ×N      a task each, but only for visitors that find no server connection parked
    ├─ visitors                the relayed ones, without a task: the engine moves their bytes
    └─ timeout ×2              ttl, idle_timeout; the tunnel's own task waits for open_timeout

Phases move one way, by `_enter` alone:

    OPENING ──► WAITING ◄──► READY        both sides listen; READY while a hidden server is connected and answers
                   └────┬──────┘
                        ▼
                    DRAINING ──► CLOSED   DRAINING: no new visitors, the relays finish

A one-shot tunnel (the reference semantics) joins one server connection with one visitor and closes when either of them
does. A persistent one outlives its relays.
"""

from __future__ import annotations

from enum import Enum

import structlog
import trio

from tunneld.engine.engine import Engine
from tunneld.net.endpoint import Endpoint
from tunneld.tunnel import timeouts
from tunneld.tunnel.agents import TunnelAgents
from tunneld.tunnel.events import Events
from tunneld.tunnel.ingress import open_ingresses
from tunneld.tunnel.server_side import NO_TAKEOVER, Takeover
from tunneld.tunnel.servers import HiddenServers
from tunneld.tunnel.snapshot import TunnelCounters, TunnelSnapshot, snapshot_of
from tunneld.tunnel.spec import TunnelSpec
from tunneld.tunnel.visitors import CUT_BY_RESTART, STOPPED, RefusalLog, VisitorRelays
from tunneld.tunnel.waiting import WaitingVisitors

log = structlog.get_logger("tunnel")


class Phase(Enum):
    """What a tunnel is doing."""

    OPENING = "opening"
    WAITING = "waiting"
    READY = "ready"
    DRAINING = "draining"
    CLOSED = "closed"


class Tunnel:
    """Ingresses, a server side and the relays between them. Opened and owned by the service."""

    def __init__(
        self,
        spec: TunnelSpec,
        engine: Engine,
        events: Events,
        snapshot: TunnelSnapshot | None = None,
        replaces: Tunnel | None = None,
    ) -> None:
        """Open the ingresses and the server side; or continue from the `snapshot` of another process. Where the tunnel
        `replaces` another one it shares that one's listeners and key as far as it gets the same address, and changes
        nothing about it.

        Raises `ListenError`, `LimitReachedError`, `ShortageError` or `UsageError`, and leaves nothing open then.
        """
        backend, limits = spec.services.backend(spec.backend), spec.limits
        counters, now = (
            snapshot.counters if snapshot is not None else TunnelCounters(quota_left=spec.quota_left),
            trio.current_time(),
        )
        self.spec = spec
        self.id = spec.id  # a short name, unique in this process
        self.limits = limits
        self.opened_at, self.idle_since = now - counters.age, now - counters.idle
        self.idle_checks = counters.idle_checks
        self.reason = ""  # why it closed
        self.expired = False  # whether that is for good, by a limit of its own
        self.agents = TunnelAgents(spec.allowed_sources)
        self._phase = Phase.OPENING
        self._engine = engine
        self._events = events
        self._snapshot = snapshot
        self._exported = False
        self._scope = trio.CancelScope()
        self._closed = trio.Event()
        refusals = RefusalLog(spec.id, events, counters.refused)
        self.refusals = refusals.visitors  # how many were refused since it was opened, by the class of the reason
        self.visitors = VisitorRelays(spec, limits, engine, events, refusals, self, counters)
        self.arrivals = WaitingVisitors(limits, self.visitors, spec.visitor_authority)
        takeover = replaces.takeover if replaces is not None else NO_TAKEOVER
        self.ingresses = open_ingresses(spec, limits, snapshot.ingresses if snapshot is not None else (), takeover)
        self.addresses = tuple([ingress.address for ingress in self.ingresses])  # what visitors reach it by
        try:
            hidden_servers = HiddenServers(self, engine, events, refusals)
            self.server_side = backend(hidden_servers.context(snapshot, takeover))
        except BaseException:
            self._close_ingresses()
            raise
        spec.tenant.server_sides.add(self.server_side)

    # State

    @property
    def phase(self) -> Phase:
        """The phase. It is WAITING, not READY, while the connected hidden server does not answer."""
        return Phase.WAITING if self._phase is Phase.READY and self.server_side.unresponsive else self._phase

    @property
    def server_uri(self) -> Endpoint:
        """The server URI, to which the hidden server connects: what openTunnel returns."""
        return self.server_side.uri

    @property
    def client_uri(self) -> Endpoint:
        """The public address to advertise, that of the first ingress: what getTunnelAddress returns."""
        return self.ingresses[0].uri

    @property
    def age(self) -> float:
        """Seconds since it was opened."""
        return trio.current_time() - self.opened_at

    @property
    def waiting(self) -> int:
        """Visitors that wait for a server connection."""
        return len(self.arrivals)

    @property
    def parked(self) -> int:
        """Server connections that wait for a visitor."""
        return self.server_side.parked

    @property
    def served(self) -> int:
        """Visitors that got a server connection, since the tunnel was opened."""
        return self.visitors.served

    @property
    def octets(self) -> tuple[int, int]:
        """Bytes delivered so far: up (to the hidden server), down (to clients)."""
        return self.visitors.octets

    @property
    def in_use(self) -> bool:
        """Whether a connection stands on either side."""
        return bool(self.visitors or self.waiting or self.parked)

    @property
    def activity(self) -> object:
        """A value that changes whenever a byte was relayed or a visitor was joined."""
        return self.octets, self.served

    @property
    def metered(self) -> int:
        """Bytes that count against the quota of its name, with the ones of earlier tunnels of that name."""
        quota, left = self.limits.quota, self.visitors.quota_left
        return self.spec.metered if quota is None or left is None else quota - left

    @property
    def used(self) -> int:
        """Bytes that count against its quota, or would if it had one."""
        return self.metered if self.limits.quota is not None else self.spec.metered + sum(self.octets)

    # Actions

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until closed. An exception out of here is a bug; both sides and all relays are closed even then."""
        limits = self.limits
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    self._start(nursery)
                    self._enter(Phase.READY if self.parked else Phase.WAITING)
                    if self._snapshot is not None:
                        self._adopt(self._snapshot)
                    if limits.ttl is not None:
                        nursery.start_soon(timeouts.close_after, self, limits.ttl)
                    if limits.idle_timeout is not None:
                        nursery.start_soon(timeouts.close_when_idle, self, limits.idle_timeout)
                    task_status.started()
                    await timeouts.close_when_unused(self, limits.open_timeout)  # here: a task costs 3 KiB
        finally:
            self._stop()

    @property
    def takeover(self) -> Takeover:
        """What a tunnel that replaces this one may share with it."""
        server = self.server_side.takeover
        listeners = [listener for ingress in self.ingresses for listener in ingress.listeners]
        return Takeover([*listeners, *server.listeners], server.key, self.addresses)

    @property
    def is_closing(self) -> bool:
        """Whether it was told to close, or has closed."""
        return self._scope.cancel_called or self._phase is Phase.CLOSED

    def give_way(self, successor: Tunnel, reason: str) -> None:
        """Close now, in favour of a tunnel that shares the listeners: accept nothing from them any more. Visitors that
        wait for a server connection will wait there.
        """
        self.pause()
        successor.arrivals.inherit(self.arrivals)
        self.close(reason)

    def discard(self) -> None:
        """Close both sides of a tunnel that was never run. Nothing for one that was."""
        if self._phase is Phase.OPENING:
            self._phase = Phase.CLOSED
            self.reason = self.reason or STOPPED
            self._close_ingresses()
            self.arrivals.discard()
            self.server_side.close()
            self._closed.set()

    def close(self, reason: str) -> None:
        """Close now and drop every connection. Of several reasons the first is reported."""
        self.reason = self.reason or reason
        self._scope.cancel()

    def expire(self, reason: str) -> None:
        """Close now, because a limit of the tunnel ends it for good: its agent is not to open it again."""
        self.expired = self.expired or not self.reason
        self.close(reason)

    def drain(self, reason: str = "") -> None:
        """Accept no new visitors and close when the last relay has ended. Waiting visitors are closed. `reason` is for
        the log.
        """
        if self._phase in {Phase.DRAINING, Phase.CLOSED}:
            return
        self._enter(Phase.DRAINING)
        self._close_ingresses()
        self.server_side.close()
        self._events.publish("draining", id=self.id, visitors=len(self.visitors))
        more = {"reason": reason} if reason else {}
        log.info("tunnel draining", tunnel=self.id, visitors=len(self.visitors), **more)
        if not self.visitors:
            self.close("drained")

    def change(self, spec: TunnelSpec) -> None:
        """Other limits hold from now on, see `VisitorRelays.change`."""
        used, self.spec, self.limits = self.used, spec, spec.limits
        left = None if spec.limits.quota is None else max(0, spec.limits.quota - used)
        self.visitors.change(spec, self.arrivals.peers, left)
        for ingress in self.ingresses:
            ingress.change(spec)

    def pause(self) -> None:
        """Accept no connection on either side for now; new ones stay in the listeners' queues. Precedes `export`."""
        for ingress in self.ingresses:
            ingress.pause()
        self.server_side.pause()

    def export(self) -> TunnelSnapshot:
        """Hand over what another process can continue, and end the rest: carriers have their state in this process. The
        tunnel closes here without an event. The caller owns the sockets of the snapshot.
        """
        self._exported = True
        self.reason = STOPPED  # for this process alone: the address stays reserved
        snapshot = snapshot_of(self, draining=self._phase is Phase.DRAINING)
        self._scope.cancel()
        return snapshot

    def dismiss(self, agent: str) -> bool:
        """An agent accepts no more visitors. Drain unless other agents serve the tunnel; returns whether it drains."""
        self.agents.leave(agent)
        was_last = not self.agents and not self.server_side.live_connections
        if was_last or not self.spec.options.share:
            self.drain()
        else:
            for ingress in self.ingresses:
                ingress.leave_idle()
        return self._phase in {Phase.DRAINING, Phase.CLOSED}

    def trim(self, keep: int, host: str) -> int:
        """Close surplus parked server connections, see `ServerSide.trim`, for the agent at the address `host`. That
        agent knows its own demand only, so connections from the addresses of other agents stay.
        """
        return self.server_side.trim(keep, self.agents.hosts_except(host))

    def fail(self, error: Exception) -> None:
        """Log a bug in one of this tunnel's callbacks and close this tunnel alone."""
        log.error("tunnel failed", tunnel=self.id, exc_info=error)
        self.close("internal error")

    async def wait_closed(self) -> None:
        """Wait until both listeners and all connections are closed."""
        await self._closed.wait()

    # Called by the server side and by the visitors

    def on_attached(self) -> None:
        """A hidden server connected."""
        if self._phase is Phase.WAITING:
            self._enter(Phase.READY)

    def on_visitor_left(self, reason: str) -> None:
        """Close a one-shot tunnel with `reason`; close a draining one after its last; else return to WAITING."""
        if not self.limits.persist:
            self.close(reason)
        elif not self.visitors.relays:
            self.idle_since = trio.current_time()
            if self._phase is Phase.DRAINING:
                self.close("drained")
            elif self._phase is Phase.READY and not self.parked:
                self._enter(Phase.WAITING)

    # Handover and end

    def _adopt(self, snapshot: TunnelSnapshot) -> None:
        """Continue the relays of another process, and its drain."""
        self._snapshot = None
        self.visitors.adopt(snapshot.relays, [one.visitor.peer for one in snapshot.waiting])
        if self.visitors and self._phase is Phase.WAITING:
            self._enter(Phase.READY)
        if snapshot.draining:
            self.drain()
        elif self.served and not self.limits.persist and not self.visitors:
            self.close(CUT_BY_RESTART)

    def _start(self, nursery: trio.Nursery) -> None:
        """Both sides work, in tasks of `nursery`: first the server side, then the queue, then the visitors come."""
        self.server_side.start(nursery)
        adopted = self._snapshot.waiting if self._snapshot is not None else ()
        self.arrivals.start(self._engine, self.server_side, nursery, self.fail, adopted)
        for ingress in self.ingresses:
            ingress.listen(self._engine, self.arrivals, nursery, self.fail)

    def _close_ingresses(self) -> None:
        for ingress in self.ingresses:
            ingress.close()

    def _enter(self, phase: Phase) -> None:
        log.debug("phase", tunnel=self.id, was=self._phase.value, now=phase.value)
        self._phase = phase

    def _stop(self) -> None:
        """Close both listeners, drop every connection, and publish the end."""
        self._enter(Phase.CLOSED)
        self.reason = self.reason or STOPPED
        self._close_ingresses()
        self.server_side.close()
        self.spec.tenant.server_sides.discard(self.server_side)
        self.visitors.drop(self.reason)
        if self._exported:
            self._closed.set()
            return
        up, down = self.octets
        self._events.publish("closed", id=self.id, reason=self.reason, visitors=self.served, up=up, down=down)
        refused = self.refusals.total()
        log.info(
            "tunnel closed",
            tunnel=self.id,
            reason=self.reason,
            visitors=self.served,
            refused=refused,
            up=up,
            down=down,
        )
        self._closed.set()
