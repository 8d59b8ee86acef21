"""Opens, closes and drains tunnels: the two calls of the interface, and what an operator does.

    tunnels                    isolation boundary: an exception closes its tunnel and is logged once
    └─ tunnel ×N               see tunnel/tunnel.py

Which tunnels are open, and how they are found, is in registry.py.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path

import structlog
import trio

from tunneld.config.schema import Settings
from tunneld.directory.registry import TunnelRegistry, check_agrees
from tunneld.directory.requester import Requester
from tunneld.directory.reservations import Reservations, reservation_key
from tunneld.directory.turns import RequestTurns
from tunneld.engine.engine import Engine
from tunneld.errors import DrainingError, LimitReachedError, ListenError, TunneldError, UsageError
from tunneld.net.endpoint import is_wildcard
from tunneld.net.sockets import descriptors_for_tunnels
from tunneld.policy.access import EVERYBODY, Grant, bound_server_from, permit
from tunneld.policy.limits import effective_limits
from tunneld.policy.options import TunnelOptions
from tunneld.policy.places import check_share
from tunneld.policy.reservations import Reservation, ReservationKey
from tunneld.tunnel.events import Events
from tunneld.tunnel.keys import KeyRegistry
from tunneld.tunnel.server_side import Backend, BackendServices, Handshakes
from tunneld.tunnel.snapshot import ServiceSnapshot
from tunneld.tunnel.spec import TunnelSpec
from tunneld.tunnel.tenants import Tenants
from tunneld.tunnel.tunnel import STOPPED, Phase, Tunnel

log = structlog.get_logger("service")

NEW_TUNNEL_GRACE = 10.0
"""Seconds after opening in which `replace=no` treats a tunnel as served, though no server connection has arrived: an
agent on a slow network keeps the name that it has just taken over.
"""


class TunnelService(TunnelRegistry):
    """All tunnels of this process."""

    def __init__(
        self,
        settings: Callable[[], Settings],
        engine: Engine,
        backends: Mapping[str, Backend],
        keys: KeyRegistry | None = None,
        state: Path | None = None,
        handshakes: Handshakes | None = None,
    ) -> None:
        """`settings` is called for every request, so that a reload applies to the next tunnel. `backends` has the names
        that openTunnel accepts, `keys` the shared ports. `state` is the directory for reservations; None: they are kept
        in memory only. `handshakes` authenticates hidden servers on ports of their own.
        """
        super().__init__()
        self.settings = settings
        self.events = Events(self._owners.get)
        self.turns = RequestTurns()
        self.reservations = Reservations(settings, state)
        self.draining = False
        self.leaving = False
        self.keys = keys if keys is not None else KeyRegistry()
        self._engine = engine
        self._services = BackendServices(backends, self.keys, handshakes)
        self._tenants = Tenants(settings, descriptors_for_tunnels())
        self._released_on_close: set[str] = set()  # ids of tunnels that lose their reservation when they close
        self._nursery: trio.Nursery

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the tunnels until cancelled, which drops them all."""
        async with trio.open_nursery() as self._nursery:
            await self._nursery.start(self.reservations.run)
            task_status.started()
            await trio.sleep_forever()

    async def open_tunnel(self, backend: str, options: TunnelOptions, requester: Requester) -> Tunnel:
        """Open a tunnel; it listens on both sides when this returns. It replaces a tunnel of the same name and owner
        and gets the address reserved for them, unless another port is requested.

        Raises `DrainingError`, `LimitReachedError`, `ListenError`, `NotAllowedError`, `ShortageError` or `UsageError`,
        and leaves nothing behind then.
        """
        settings, grant, backend = self.settings().tunnels, requester.known_grant, backend.lower()
        self._check_open()
        self._services.backend(backend).check(self._services, options)
        holder = reservation_key(options.name, grant.name, requester.host)
        if not options.replace:
            self._check_unserved(holder)
        opened = self.count_of(grant.name) - self._replaceable(holder)
        options, requested = permit(grant, backend, options, requester.host, opened), options
        if (shared := self._shared(holder, options)) is not None:
            check_agrees(shared, backend, options, requested, grant)
            self._join(shared, options, requester)
            return shared
        self._check_share(grant, backend, holder, opened)
        options = effective_limits(settings, grant, options).bound(options)
        before = self.reservations.recall(holder, options.client_port, grant)  # fails before a tunnel is replaced
        await self._replace(holder)
        address = self.reservations.recall(holder, options.client_port, grant) or before
        if self.count >= settings.max_tunnels:
            raise LimitReachedError(
                f"tunnel limit reached: the relay has {self.count} of {settings.max_tunnels} open (tunnels.max_tunnels)"
            )
        spec = TunnelSpec(
            id=self.next_id,
            backend=backend,
            options=options,
            settings=settings,
            owner=requester.owner,
            requester_host=requester.host,
            advertised_host=settings.advertised_host or _reachable(settings.host, requester),
            services=self._services,
            former_uri=address.server if address is not None else None,
            reserved=self.reservations.table,
            asked_from=requested.server_from,
            tenant=self._tenants.of(grant.name, requester.host),
        )
        tunnel = self._make(spec, address)
        self.add(tunnel, grant.name, holder)  # before the next await, or two requests could pass a limit at once
        self.reservations.hold(holder, tunnel)
        self._announce(tunnel)
        if options.share:
            self._join(tunnel, options, requester)
        await self._nursery.start(self._run, tunnel)
        await self.reservations.saved()
        return tunnel

    def join(self, reference: str, requester: Requester) -> Tunnel:
        """An agent that lost its control connection has reconnected, perhaps from another address: permit its server
        connections from there. Raises `NoSuchTunnelError`, `NotAllowedError`.
        """
        grant = requester.known_grant
        tunnel = self.find(reference, grant)
        spec = tunnel.spec
        options = bound_server_from(grant, replace(spec.options, server_from=spec.asked_from), requester.host)
        if options.share:
            self._join(tunnel, options, requester)
        else:
            tunnel.agents.move(spec.allowed_sources_for(options.server_from, requester.host))
        return tunnel

    def _join(self, tunnel: Tunnel, options: TunnelOptions, requester: Requester) -> None:
        """Add the requester to the agents of a shared tunnel, until its control connection ends or it leaves."""
        network = tunnel.spec.allowed_sources_for(options.server_from, requester.host)
        tunnel.agents.join(requester.owner, requester.host, network)
        requester.at_end(tunnel.id, lambda: tunnel.agents.leave(requester.owner))

    def _make(self, spec: TunnelSpec, address: Reservation | None) -> Tunnel:
        """Make the tunnel, at its reserved address if it has one. Where another program has taken the port, or a reload
        has moved the range, the tunnel gets another address rather than none.
        """
        options = spec.options
        if address is not None and options.client_port is None:
            there = replace(spec, options=replace(options, client_port=address.client_port))
            try:
                return Tunnel(there, self._engine, self.events)
            except (LimitReachedError, ListenError, UsageError) as error:
                tunnel = Tunnel(spec, self._engine, self.events)
                log.warning(
                    "tunnel could not get its reserved address", tunnel=spec.id, was=address.client_port,
                    now=tunnel.client_uri.port, reason=str(error),
                )  # fmt: skip
                return tunnel
        return Tunnel(spec, self._engine, self.events)

    def find_named(self, name: str, requester: Requester) -> Tunnel | None:
        """The requester's own open tunnel with this name."""
        return self.current_of(reservation_key(name, requester.known_grant.name, requester.host))

    async def close(self, reference: str, grant: Grant = EVERYBODY, *, keep: bool = False) -> Tunnel:
        """Close one tunnel now; it is closed when this returns. Its address is released unless it is to be kept.
        Raises `NoSuchTunnelError`.
        """
        tunnel = self.find(reference, grant)
        if not keep:
            self._released_on_close.add(tunnel.id)
        tunnel.close(self.end_by_request(tunnel, "closed", grant, reopen=keep))
        await tunnel.wait_closed()
        await self.reservations.saved()
        return tunnel

    def drain_one(self, reference: str, grant: Grant = EVERYBODY) -> Tunnel:
        """Drain one tunnel; it closes when its last visitor has left. Raises `NoSuchTunnelError`."""
        tunnel = self.find(reference, grant)
        tunnel.drain(self.end_by_request(tunnel, "drained", grant))
        return tunnel

    async def drain(self) -> None:
        """Accept nothing new and wait until the last relay has ended."""
        self.draining = True
        for tunnel in self.tunnels():
            tunnel.drain()
        for tunnel in self.tunnels():
            await tunnel.wait_closed()

    def drain_revoked(self, credentials: Collection[str]) -> None:
        """Drain the tunnels of all credentials that are not among these names, drop their reservations, and end their
        `watch` requests.
        """
        self.events.refresh()
        for tunnel in self.tunnels():
            owner = self.owner_of(tunnel.id)
            if owner and owner not in credentials:
                log.info("draining tunnel: its credential was removed", tunnel=tunnel.id, credential=owner)
                tunnel.drain()
        self.reservations.retain(credentials)

    # Handover to another process

    async def export(self) -> ServiceSnapshot:
        """Hand over all tunnels to another process: what it can continue is not closed, the rest ends in order. No
        tunnel can be opened any more.
        """
        self.leaving = True
        await self.reservations.saved()
        for tunnel in self.tunnels():
            tunnel.pause()
        for _ in range(2):  # visitors that were just given a server connection are joined to it
            await trio.lowlevel.checkpoint()
        snapshots = []
        for tunnel in self.tunnels():
            try:
                snapshots.append((self.owner_of(tunnel.id), tunnel.export()))
            except Exception as error:
                tunnel.fail(error)
        return ServiceSnapshot(self.past, snapshots)

    async def adopt(self, snapshot: ServiceSnapshot) -> None:
        """Continue the tunnels of another process. A tunnel that cannot be continued is closed and logged."""
        self.continue_from(snapshot.counters)
        for owner, one in snapshot.tunnels:
            spec = replace(
                one.spec,
                services=self._services,
                reserved=self.reservations.table,
                tenant=self._tenants.of(owner, one.spec.requester_host),
            )
            try:
                self._services.backend(spec.backend).check(self._services, spec.options)
                tunnel = Tunnel(spec, self._engine, self.events, one)
            except TunneldError as error:
                one.close()
                log.warning("tunnel could not be taken over", tunnel=spec.id, reason=str(error))
                continue
            holder = reservation_key(spec.options.name, owner, spec.requester_host)
            self.add(tunnel, owner, holder, adopted=True)
            self.reservations.hold(holder, tunnel)
            await self._nursery.start(self._run, tunnel)
        await self.reservations.saved()

    def _check_open(self) -> None:
        """Raise `DrainingError` where no tunnel may be opened any more."""
        if self.draining:
            raise DrainingError("could not open a tunnel: the relay is draining and accepts no new tunnels")
        if self.leaving:
            raise DrainingError("could not open a tunnel: the relay is restarting; try again in a moment")

    def _check_share(self, grant: Grant, backend: str, holder: ReservationKey | None, opened: int) -> None:
        """Raise `LimitReachedError` where one more tunnel would be more than its share of all tunnels or
        ports. `opened` is the number of open tunnels of the credential.
        """
        settings = self.settings()
        share, ports = settings.control.credential_share, settings.tunnels.port_range
        if grant.max_tunnels is None:
            check_share(grant, "tunnel", opened + 1, settings.tunnels.max_tunnels, share)
        if ports[0] and not (holder and self.reservations.table.find(holder)):
            needed = 2 if backend == "tcp" else 1
            held = [
                port for port in self.reservations.ports_of(grant.name) | self.ports_of(grant.name) if port in ports
            ]
            check_share(grant, "port", len(held) + needed, max(len(ports), 2 * needed), share)

    # Tunnels of the same name and owner

    def _shared(self, holder: ReservationKey | None, options: TunnelOptions) -> Tunnel | None:
        """The open tunnel to serve, for options with `share`. Raises `UsageError` where they cannot have it."""
        if not options.share:
            return None
        if holder is None or not options.persist:
            raise UsageError("share=yes requires a name and persist=yes")
        current = self.current_of(holder)
        return current if current is not None and current.spec.options.share else None

    def _check_unserved(self, holder: ReservationKey | None) -> None:
        """Raise `LimitReachedError` where an agent serves the open tunnel of this holder."""
        current = self.current_of(holder)
        if current is not None and (current.phase is Phase.READY or current.age < NEW_TUNNEL_GRACE):
            raise LimitReachedError(
                f"tunnel {current.spec.options.name!r} is served by another agent, {current.spec.owner} "
                f"({current.id}); stop that agent, or use another name (replace=no)"
            )

    async def _replace(self, holder: ReservationKey | None) -> None:
        """Close the open tunnel of this holder. Of several requests at once the last one's tunnel stays."""
        while (current := self.current_of(holder)) is not None:
            current.close("replaced by a new tunnel of the same name and owner")
            await current.wait_closed()

    def _replaceable(self, holder: ReservationKey | None) -> int:
        """How many tunnels do not count against the limit of a new one of this holder: the open one, which it replaces,
        and one that drains. Otherwise a credential with all its tunnels open could not replace a draining one before
        its last visitor has left.
        """
        tunnels = self.all_of(holder)
        draining = sum(tunnel.phase is Phase.DRAINING for tunnel in tunnels)
        return min(draining, 1) + (len(tunnels) > draining)

    # One tunnel

    async def _run(self, tunnel: Tunnel, *, task_status: trio.TaskStatus[None]) -> None:
        """Run one tunnel until it closes. A bug closes this tunnel, never the daemon."""
        try:
            await tunnel.run(task_status=task_status)
        except Exception as error:
            tunnel.fail(error)
        finally:
            self.remove(tunnel)
            self._release(tunnel)

    def _release(self, tunnel: Tunnel) -> None:
        """Keep or drop the reservation of a closed tunnel. One that closes with the daemon keeps it."""
        keep = tunnel.id not in self._released_on_close
        self._released_on_close.discard(tunnel.id)
        if not (keep and (self.draining or tunnel.reason == STOPPED)):
            self.reservations.on_closed(tunnel, keep=keep)

    def _announce(self, tunnel: Tunnel) -> None:
        fields = {
            "backend": tunnel.spec.backend,
            "server": str(tunnel.server_uri),
            "client": str(tunnel.client_uri),
            "owner": tunnel.spec.owner,
            "name": tunnel.spec.options.name,
        }
        self.events.publish("opened", id=tunnel.id, **fields)
        log.info("tunnel opened", tunnel=tunnel.id, **{**fields, "server": tunnel.server_uri.without_key})


def _reachable(bound: str, requester: Requester) -> str:
    """The host to advertise where none is configured: the bound address, or, for a wildcard, the one that the requester
    connected to.
    """
    return requester.local_host if is_wildcard(bound) else bound
