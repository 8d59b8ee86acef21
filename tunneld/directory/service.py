"""Opens, closes and drains tunnels: the two calls of the interface, and what an operator does.

A reference to a tunnel is looked up in the directory, which has its record; `local` returns the tunnel of a record on
this node. How a tunnel is opened is in opening.py, how it runs and is removed in running.py.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import structlog
import trio

from tunneld.auth.authority import Authority
from tunneld.config.schema import Settings
from tunneld.directory.changing import changed_spec, reloaded_spec
from tunneld.directory.event_history import EventHistory
from tunneld.directory.live import LiveTunnels
from tunneld.directory.local import LocalDirectory
from tunneld.directory.loop_delay import LoopDelay
from tunneld.directory.opening import TunnelOpener, record_of
from tunneld.directory.record import TunnelRecord, port_owner, reservation_key
from tunneld.directory.requester import Requester
from tunneld.directory.reservations import Reservations
from tunneld.directory.running import TunnelRunner
from tunneld.directory.turns import RequestTurns
from tunneld.engine.engine import Engine
from tunneld.errors import DrainingError, EndedError, NoSuchTunnelError, TunneldError
from tunneld.net.address import HostName
from tunneld.net.endpoint import Endpoint, parse_network
from tunneld.net.sockets import descriptors_for_tunnels
from tunneld.policy.access import EVERYBODY, Grant, bound_server_from
from tunneld.policy.bans import Bans
from tunneld.policy.options import TunnelOptions
from tunneld.sites.names import SharedNames
from tunneld.tls.identity import Identity
from tunneld.tunnel.events import Events
from tunneld.tunnel.keys import KeyRegistry
from tunneld.tunnel.private_tunnels import PrivateTunnels
from tunneld.tunnel.records import VisitorRecords
from tunneld.tunnel.server_side import Backend, BackendServices, Handshakes
from tunneld.tunnel.snapshot import ServiceSnapshot
from tunneld.tunnel.tenants import Tenant, Tenants
from tunneld.tunnel.tunnel import Phase, Tunnel

log = structlog.get_logger("service")


class TunnelService:
    """All tunnels of this process, and the directory."""

    def __init__(
        self,
        settings: Callable[[], Settings],
        engine: Engine,
        backends: Mapping[str, Backend],
        keys: KeyRegistry | None = None,
        state: Path | None = None,
        handshakes: Handshakes | None = None,
        names: SharedNames | None = None,
        bans: Bans | None = None,
        identity: Callable[[], Identity | None] = lambda: None,
    ) -> None:
        """`settings` is called for every request, so that a reload applies to the next tunnel. `backends` has the names
        that openTunnel accepts, `keys` the shared ports. `state` is the directory for reservations; None: they are kept
        in memory only. `handshakes` authenticates hidden servers on ports of their own; `names` has the host names,
        where there can be some; `bans` keep visitors away from all tunnels; `identity` returns the key of the relay,
        where it has one.
        """
        self.settings = settings
        self.live = LiveTunnels()
        self.events = Events(self.live.owner_of)
        self.history: EventHistory | None = None  # of events, where they are kept
        self.records: VisitorRecords | None = None  # the same of visitors
        self.loop_delay = LoopDelay()  # measured while the daemon runs it
        self.turns = RequestTurns()
        self.directory = LocalDirectory(settings, state)
        self.draining = False
        self.leaving = False
        self.keys = keys if keys is not None else KeyRegistry()
        self.engine = engine
        self.names = names
        self.authority = Authority(lambda: settings().control)
        self._services = BackendServices(
            backends, self.keys, handshakes, names, identity=identity, authority=self.authority
        )
        if names is not None:
            names.is_reserved = lambda name: HostName(name) in self.reservations.table
            names.is_draining = lambda: self.draining or self.leaving
        self.bans = bans if bans is not None else Bans()
        self._tenants = Tenants(descriptors_for_tunnels(), self.bans)
        self._opener = TunnelOpener(
            self._settings_for_opening,
            engine,
            self.events,
            self._services,
            self._tenants,
            self.live,
            self.directory,
        )
        self._runner = TunnelRunner(self.live, self.events, self.directory, lambda: self.draining)
        self._nursery: trio.Nursery

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the tunnels until cancelled, which drops them all."""
        self._tenants.apply(self.settings())
        async with trio.open_nursery() as self._nursery:
            await self._nursery.start(self.reservations.run)
            await self._nursery.start(self._runner.run)
            task_status.started()
            await trio.sleep_forever()

    @property
    def reservations(self) -> Reservations:
        """The reserved addresses."""
        return self.directory.reservations

    # Finding tunnels

    def tunnels(self, grant: Grant = EVERYBODY) -> Sequence[Tunnel]:
        """The open tunnels of this process that this grant may see, oldest first."""
        return self.live.visible_to(grant)

    async def find(self, reference: str, grant: Grant = EVERYBODY) -> TunnelRecord:
        """The tunnel with this id, server URI, client URI, client port, host name or name.

        Raises `NoSuchTunnelError`, also for a tunnel of another credential, or `EndedError` or `ExpiredError` where the
        server URI is that of a tunnel that has ended for good.
        """
        record = await self.directory.find(reference)
        if record is None and (uri := _port_of_url(reference)):
            record, reference = await self.directory.find(uri), uri
        if "://" in reference:
            endpoint = Endpoint.parse(reference.strip())
            if record is None or endpoint not in {record.server, record.client}:
                record = None
                await self._check_not_ended(endpoint, grant)
        elif record is None and (named := self.live.labelled(reference, grant)) is not None:
            record = self.live.record_of(named.id)
        if record is None or not grant.may_see(record.owner):
            raise NoSuchTunnelError(
                f"no open tunnel is called {reference!r}: use an id, a name, a URI or a port as list shows it"
            )
        return record

    def local(self, record: TunnelRecord) -> Tunnel:
        """The tunnel of this record. Raises `NoSuchTunnelError` where it is on another node, or has closed."""
        tunnel = self.live.find(record.id) if record.node == self.directory.node else None
        if tunnel is None:
            raise NoSuchTunnelError(f"tunnel {record.id} has closed, or is on another relay ({record.node})")
        return tunnel

    async def find_local(self, reference: str, grant: Grant = EVERYBODY) -> Tunnel:
        """The tunnel on this node with this reference. Raises as `find` and `local`."""
        return self.local(await self.find(reference, grant))

    async def find_named(self, name: str, requester: Requester) -> Tunnel | None:
        """The requester's own open tunnel with this name."""
        holder = reservation_key(name, requester.known_grant.name, requester.host)
        tunnels = [self.local(record) for record in reversed(await self.directory.held_by(holder))]
        return next((tunnel for tunnel in tunnels if tunnel.phase is not Phase.DRAINING), None)

    async def get_tunnel_address(self, uri: str, grant: Grant = EVERYBODY) -> Endpoint:
        """The public address for a server URI.

        Raises `NoSuchTunnelError`, also for a tunnel that is draining, `EndedError` or `ExpiredError` for one that has
        ended for good, or `UsageError` where `uri` is no URI.
        """
        endpoint = Endpoint.parse(uri.strip())
        found = await self.directory.find(str(endpoint))
        record = found if found is not None and found.server == endpoint else None
        draining = record is not None and self.local(record).phase is Phase.DRAINING
        if record is None or draining:
            await self._check_not_ended(endpoint, grant)
        if record is None or not grant.may_see(record.owner):
            raise NoSuchTunnelError(f"no open tunnel has the server URI {endpoint.without_key}")
        if draining:
            raise NoSuchTunnelError(f"tunnel {record.id} is draining and accepts no new visitors")
        return record.client

    async def _check_not_ended(self, server: Endpoint, grant: Grant) -> None:
        owner, error = await self.directory.why_ended(server)
        if error is not None and grant.may_see(owner):
            raise type(error)(str(error))

    # Opening and closing tunnels

    async def open_tunnel(self, backend: str, options: TunnelOptions, requester: Requester) -> Tunnel:
        """Open a tunnel; it listens on both sides when this returns. It replaces a tunnel of the same name and owner
        and gets the address reserved for them, unless another port is requested. Of several requests at once for one
        name the last one's tunnel stays.

        Raises `DrainingError`, `LimitReachedError`, `ListenError`, `NotAllowedError`, `ShortageError` or `UsageError`,
        and changes nothing then.
        """
        asked = {"backend": backend.lower(), "name": options.name, "port": options.client_port, "host": options.host}
        await self.authority.check_open(requester.known_grant, requester.host, asked)
        opened = await self._opener.open(backend.lower(), options, requester)
        tunnel = opened.tunnel
        if opened.options.share:
            self._join(tunnel, opened.options, requester)
        if opened.is_new:
            await self._runner.start(tunnel, opened.replaced)
            await self.directory.saved()
        return tunnel

    async def join(self, reference: str, requester: Requester) -> Tunnel:
        """An agent that lost its control connection has reconnected, perhaps from another address: permit its server
        connections from there. Raises `NoSuchTunnelError`, `NotAllowedError`.
        """
        grant = requester.known_grant
        tunnel = await self.find_local(reference, grant)
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
        tunnel.server_side.admit_agent(options)
        requester.at_end(tunnel.id, lambda: tunnel.agents.leave(requester.owner))

    @property
    def privates(self) -> PrivateTunnels:
        """The private tunnels of this node."""
        return self._services.privates

    def tenant_of(self, credential: str, host: str) -> Tenant:
        """What all tunnels of a credential share; of the address `host` on a relay without credentials."""
        return self._tenants.of(credential, host)

    async def close(self, reference: str, grant: Grant = EVERYBODY, *, keep: bool = False) -> Tunnel:
        """Close one tunnel now; it is closed when this returns. Its address is released unless it is to be kept.
        Raises `NoSuchTunnelError`.
        """
        record = await self.find(reference, grant)
        tunnel = self.local(record)
        if not keep:
            self._runner.release_on_close(tunnel)
        tunnel.close(await self._end_by_request(record, "closed", grant, reopen=keep))
        await tunnel.wait_closed()
        await self.directory.saved()
        return tunnel

    async def drain_one(self, reference: str, grant: Grant = EVERYBODY) -> Tunnel:
        """Drain one tunnel; it closes when its last visitor has left. Raises `NoSuchTunnelError`."""
        record = await self.find(reference, grant)
        tunnel = self.local(record)
        tunnel.drain(await self._end_by_request(record, "drained", grant))
        return tunnel

    async def change(self, reference: str, words: Mapping[str, str], grant: Grant = EVERYBODY) -> Tunnel:
        """Change limits of a tunnel, see changing.py. Raises `NoSuchTunnelError`, or `UsageError` where they exceed
        those of its owner or of the relay.
        """
        record, settings = await self.find(reference, grant), self.settings()
        tunnel = self.local(record)
        of_owner = (one.grant for one in settings.credential if one.name == record.owner)
        owner = next(of_owner, EVERYBODY)
        tunnel.change(changed_spec(tunnel.spec, words, settings.tunnels, owner, tunnel.used))
        self._runner.meter(tunnel)
        return tunnel

    async def _end_by_request(self, record: TunnelRecord, action: str, grant: Grant, *, reopen: bool = False) -> str:
        """Note that this grant `closed` or `drained` a tunnel, so that its agent does not open it again, unless it may
        `reopen` it. Returns the reason as text.
        """
        reason = grant.by_request(action)
        if not reopen:
            await self.directory.note_end(record.server, record.owner, EndedError(f"tunnel {record.id} was {reason}"))
        return reason

    async def drain(self) -> None:
        """Accept nothing new and wait until the last relay has ended."""
        self.draining = True
        if self.names is not None:
            self.names.on_draining()
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
            owner = self.live.record_of(tunnel.id).owner
            if owner and owner not in credentials:
                log.info("draining tunnel: its credential was removed", tunnel=tunnel.id, credential=owner)
                tunnel.drain()
        self.reservations.retain(credentials)

    def apply_settings(self) -> None:
        """A reload may have changed the limits of credentials, the networks of visitors, and moved shared ports or
        changed their scheme: update the tenants, the tunnels, and the server URIs in the directory.
        """
        settings = self.settings()
        self._tenants.apply(settings)
        for tunnel in self.tunnels():
            if (changed := reloaded_spec(tunnel.spec, settings.tunnels)) is not None:
                tunnel.change(changed)
            record = self.live.record_of(tunnel.id)
            if record.server != tunnel.server_uri:
                record = replace(record, server=tunnel.server_uri)
                self.live.update(record)
                self._nursery.start_soon(self.directory.update, record)

    def _settings_for_opening(self) -> Settings:
        """The settings in force. Raises `DrainingError` where none may be opened any more."""
        if self.draining:
            raise DrainingError("could not open a tunnel: the relay is draining and accepts no new tunnels")
        if self.leaving:
            raise DrainingError("could not open a tunnel: the relay is restarting; try again in a moment")
        return self.settings()

    # Handover to another process

    async def export(self) -> ServiceSnapshot:
        """Hand over all tunnels to another process: what it can continue is not closed, the rest ends in order. No
        tunnel can be opened any more.
        """
        self.leaving = True
        await self.directory.saved()
        for tunnel in self.tunnels():
            tunnel.pause()
        for _ in range(2):  # visitors that were just given a server connection are joined to it
            await trio.lowlevel.checkpoint()
        snapshots = []
        for tunnel in self.tunnels():
            try:
                snapshots.append((self.live.record_of(tunnel.id).owner, tunnel.export()))
            except Exception as error:
                tunnel.fail(error)
        now = trio.current_time()
        bans = [(str(ban.network), ban.left) for ban in self.bans.report(now)]
        return ServiceSnapshot(self.live.past, snapshots, self.directory.pool.quarantined(now), bans)

    async def adopt(self, snapshot: ServiceSnapshot) -> None:
        """Continue the tunnels of another process. A tunnel that cannot be continued is closed and logged."""
        self.live.continue_from(snapshot.counters)
        for port, former, seconds in snapshot.quarantined:
            self.directory.pool.restore(port, former, trio.current_time() - seconds)
        for network, left in snapshot.bans:
            self.bans.add(parse_network(network), trio.current_time() + left)
        for owner, one in snapshot.tunnels:
            spec = replace(
                one.spec,
                services=self._services,
                ports=self.directory.ports(port_owner(owner, one.spec.requester_host)),
                tenant=self._tenants.of(owner, one.spec.requester_host),
            )
            try:
                self._services.backend(spec.backend).check(self._services, spec.options)
                tunnel = Tunnel(spec, self.engine, self.events, one)
            except TunneldError as error:
                one.close()
                log.warning("tunnel could not be taken over", tunnel=spec.id, reason=str(error))
                continue
            record = record_of(tunnel, self.directory.node, owner)
            self.live.add(tunnel, record, adopted=True)
            await self.directory.open(record)
            await self._runner.start(tunnel, is_new=False)
        await self.directory.saved()


def _port_of_url(reference: str) -> str:
    """The client URI of a tunnel with this URL: `tcp://HOST:PORT` for `http://HOST:PORT/`. Empty where it is none."""
    if not reference.startswith(("http://", "https://")):
        return ""
    endpoint = Endpoint.parse(reference.strip())
    return str(Endpoint("tcp", endpoint.host, endpoint.port))
