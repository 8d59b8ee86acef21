"""The opening of a tunnel, all or nothing.

    check      what the requester may do, and what the directory knows: no effect
    prepare    ports, keys, both sides of the new tunnel: bound, and not served yet
    commit     enter it in the directory; then the tunnel that it replaces gives way
    start      it serves, once that one has closed

Whatever fails does so before the commit, and leaves no trace: a tunnel that would have been replaced serves its
visitors as before. The new tunnel shares the listeners of the one that it replaces, so an address is never without one.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import structlog
import trio

from tunneld.config.schema import Settings, TunnelSettings
from tunneld.directory.agreement import check_agrees, check_unserved, shared_tunnel
from tunneld.directory.host_names import Proofs, find_proofs, resolve_names
from tunneld.directory.live import LiveTunnels
from tunneld.directory.record import AddressClaim, Directory, TunnelRecord, port_owner, reservation_key
from tunneld.directory.requester import Requester
from tunneld.engine.engine import Engine
from tunneld.errors import ExpiredError, LimitReachedError, ListenError, NotAllowedError, UsageError
from tunneld.net.address import HostName, Private
from tunneld.net.endpoint import is_loopback, is_wildcard
from tunneld.policy.access import Grant, permit
from tunneld.policy.options import TunnelOptions
from tunneld.policy.places import check_share
from tunneld.policy.ports import Owner
from tunneld.policy.private import check_private_options, claimed_text
from tunneld.policy.reservations import Reservation, ReservationKey
from tunneld.policy.site_rules import check_site_options
from tunneld.tls.identity import is_signed_by
from tunneld.tunnel.events import Events
from tunneld.tunnel.server_side import BackendServices
from tunneld.tunnel.spec import TunnelSpec
from tunneld.tunnel.tenants import Tenants
from tunneld.tunnel.tunnel import Phase, Tunnel
from tunneld.wire.lines import Value

log = structlog.get_logger("service")


@dataclass(frozen=True, slots=True)
class OpenedTunnel:
    """The result of an opening: a tunnel that is to be started once the `replaced` one has closed; or the open tunnel
    that the requester is to serve with other agents.
    """

    tunnel: Tunnel
    options: TunnelOptions  # within the grant
    is_new: bool
    replaced: Tunnel | None = None


class TunnelOpener:
    """Opens tunnels, up to the point where they are to be started."""

    def __init__(
        self,
        settings: Callable[[], Settings],
        engine: Engine,
        events: Events,
        services: BackendServices,
        tenants: Tenants,
        live: LiveTunnels,
        directory: Directory,
    ) -> None:
        """`settings` is called for each request, and raises `DrainingError` where none may be opened any more."""
        self._settings = settings
        self._engine = engine
        self._events = events
        self._services = services
        self._tenants = tenants
        self._live = live
        self._directory = directory
        self._turns: dict[ReservationKey, trio.Lock] = {}

    async def open(self, backend: str, options: TunnelOptions, requester: Requester) -> OpenedTunnel:
        """Check, prepare and commit, one after another where several requests have the same name. Raises as
        `TunnelService.open_tunnel`.
        """
        place = requester.host if options.private is None else str(options.private.node)
        grant = requester.known_grant
        holder = reservation_key(options.name, grant.name, place)
        proofs = await find_proofs(self._services.names, options.host, grant)
        if holder is None:
            return await self._open(backend, options, requester, grant, holder, proofs)
        turn = self._turns.setdefault(holder, trio.Lock())
        try:
            async with turn:
                return await self._open(backend, options, requester, grant, holder, proofs)
        finally:
            if not turn.locked():
                self._turns.pop(holder, None)

    async def _open(
        self,
        backend: str,
        options: TunnelOptions,
        requester: Requester,
        grant: Grant,
        holder: ReservationKey | None,
        proofs: Proofs,
    ) -> OpenedTunnel:
        settings = self._settings()
        owner = port_owner(grant.name, requester.host)
        claim = await self._directory.claim(holder, owner, options.requested_ports, grant)
        tunnels = [tunnel for record in claim.records if (tunnel := self._live.find(record.id)) is not None]
        replaceable = [tunnel for tunnel in tunnels if tunnel.phase is not Phase.DRAINING]
        current = replaceable[-1] if replaceable else None
        self._services.backend(backend).check(self._services, options)
        if not options.replace:
            check_unserved(current)
        draining = min(1, len(tunnels) - len(replaceable))  # one does not count, or it could block its successor
        opened = self._live.count_of(grant.name) - len(replaceable) - draining
        permitted = permit(grant, backend, options, requester.host, opened)
        names = resolve_names(self._services.names, permitted.host, grant, claim.reservation, proofs)
        if names and self._services.names is not None:
            self._services.names.check(keeps_tls=permitted.tls == "pass")
        permitted = replace(permitted, host=tuple(map(str, names)))
        private = _private_address(permitted, grant)
        _check_bind(permitted.bind, settings.tunnels.host)
        check_site_options(permitted, settings.names.forward_auth)
        if (shared := shared_tunnel(current, permitted)) is not None:
            check_agrees(shared, backend, permitted, options, grant)
            return OpenedTunnel(shared, permitted, is_new=False)
        needs_port = private is None and (not names or permitted.client_port is not None)
        public_ports = permitted.port_count if needs_port else 0
        self._check_share(settings, grant, backend, owner, opened, claim, public_ports)
        refusal = claim.refusal or await self._directory.why_names_refused(holder, names, owner, grant)
        if private is not None:
            refusal = refusal or await self._directory.why_private_refused(holder, private, grant)
        spec = self._resolve(backend, permitted, options, requester, grant, claim, settings.tunnels, names, current)
        _check_quota(spec)
        if refusal:
            raise LimitReachedError(refusal)
        _check_room(settings.tunnels, len(self._live) - len(replaceable))
        tunnel = self._prepare(spec, claim.reservation, permitted.client_port, current)
        await self._commit(tunnel, record_of(tunnel, self._directory.node, grant.name), claim)
        if current is not None:
            current.give_way(tunnel, "replaced by a new tunnel of the same name and owner")
        return OpenedTunnel(tunnel, permitted, is_new=True, replaced=current)

    def _check_share(
        self,
        settings: Settings,
        grant: Grant,
        backend: str,
        owner: Owner,
        opened: int,
        claim: AddressClaim,
        public_ports: int,
    ) -> None:
        """Raise `LimitReachedError` where one more tunnel would be more than its share of all tunnels or ports.
        `opened` is the number of open tunnels of the credential.
        """
        share, ports = settings.control.credential_share, settings.tunnels.port_range
        if grant.max_tunnels is None:
            check_share(grant, "tunnel", opened + 1, settings.tunnels.max_tunnels, share)
        if ports[0] and claim.reservation is None and (public_ports or backend == "tcp"):
            needed = int(backend == "tcp") + public_ports
            wanted = self._directory.ports_held(owner, ports) + needed
            check_share(grant, "port", wanted, max(len(ports), 2 * needed), share)

    def _resolve(
        self,
        backend: str,
        permitted: TunnelOptions,
        requested: TunnelOptions,
        requester: Requester,
        grant: Grant,
        claim: AddressClaim,
        settings: TunnelSettings,
        names: tuple[HostName, ...],
        current: Tunnel | None,
    ) -> TunnelSpec:
        """All that is known of the tunnel, with its limits and its reserved address. It replaces `current`."""
        address = claim.reservation
        wanted: Sequence[int] = permitted.requested_ports
        if address is not None and permitted.client_port is None and not names and permitted.private is None:
            permitted = replace(permitted, client_port=address.client_port)
            reserved = address.public_ports
            wanted = reserved if len(reserved) == permitted.port_count else permitted.requested_ports
        return TunnelSpec(
            id=self._live.next_id,
            backend=backend,
            options=permitted,
            settings=settings,
            owner=requester.owner,
            requester_host=requester.host,
            advertised_host=settings.advertised_host or _reachable(settings.host, requester),
            services=self._services,
            former_uri=address.server if address is not None else None,
            ports=self._directory.ports(port_owner(grant.name, requester.host)),
            asked_from=requested.server_from,
            tenant=self._tenants.of(grant.name, requester.host),
            uid=uuid.uuid4().hex,
            wanted_ports=tuple(wanted),
            metered=current.metered if current is not None else address.metered if address is not None else 0,
            generation=max((record.generation for record in claim.records), default=0) + 1,
            names=names,
            credential=grant.name,
            grant=grant,
        )

    def _prepare(
        self, spec: TunnelSpec, address: Reservation | None, requested: int | None, replaced: Tunnel | None
    ) -> Tunnel:
        """Make the tunnel, at its reserved address if it has one. Where another program has taken the port, or a reload
        has moved the range, the tunnel gets another address rather than none.
        """
        if address is None or requested is not None:
            return Tunnel(spec, self._engine, self._events, replaces=replaced)
        try:
            return Tunnel(spec, self._engine, self._events, replaces=replaced)
        except (LimitReachedError, ListenError, UsageError) as error:
            anywhere = replace(spec, options=replace(spec.options, client_port=None), wanted_ports=())
            tunnel = Tunnel(anywhere, self._engine, self._events, replaces=replaced)
            log.warning(
                "tunnel could not get its reserved address", tunnel=spec.id, was=address.client_port,
                now=tunnel.client_uri.port, reason=str(error),
            )  # fmt: skip
            return tunnel

    async def _commit(self, tunnel: Tunnel, record: TunnelRecord, claim: AddressClaim) -> None:
        """Enter the tunnel. Here first, and before the next await, or two requests could pass a limit at once."""
        self._live.add(tunnel, record)
        try:
            await self._directory.open(record, claim)
        except BaseException:
            self._live.remove(tunnel)
            tunnel.discard()
            raise


def record_of(tunnel: Tunnel, node: str, owner: str) -> TunnelRecord:
    """The record of a tunnel of the credential `owner` at this node."""
    spec = tunnel.spec
    return TunnelRecord(
        uid=spec.uid,
        id=spec.id,
        owner=owner,
        host=spec.requester_host,
        name=spec.options.name,
        backend=spec.backend,
        server=tunnel.server_uri,
        ports=tuple(listener.getsockname()[1] for listener in tunnel.takeover.listeners),
        client=tunnel.client_uri,
        addresses=tunnel.addresses,
        node=node,
        generation=spec.generation,
        opened=time.time() - tunnel.age,
        metered=tunnel.metered,
    )


def announce(events: Events, tunnel: Tunnel, record: TunnelRecord) -> None:
    """Publish and log that a tunnel is open."""
    fields: dict[str, Value] = {
        "backend": record.backend,
        "server": record.server.without_key,
        "client": str(record.client),
    }
    fields |= {"owner": tunnel.spec.owner, "name": record.name}
    events.publish("opened", id=record.id, **fields)
    log.info("tunnel opened", tunnel=record.id, **fields)


def _check_quota(spec: TunnelSpec) -> None:
    """Raise `ExpiredError` where earlier tunnels of the same name have used up the quota."""
    if spec.quota_left == 0:
        name, quota = spec.options.name, spec.limits.quota
        raise ExpiredError(
            f"could not open a tunnel: the quota of {quota} bytes of {name!r} is used up until its reservation ends or "
            f"is released (quota)"
        )


def _check_bind(address: str, host: str) -> None:
    """Raise `UsageError` where the relay does not listen at an address for tunnels."""
    everywhere = host in {"", "::"} or (is_wildcard(host) and ":" not in address)
    if address and not everywhere and address != host and not (is_loopback(address) and is_loopback(host)):
        raise UsageError(f"address {address} is none at which this relay has tunnels, only {host} (tunnels.host)")


def _private_address(options: TunnelOptions, grant: Grant) -> Private | None:
    """The address of a private tunnel. Raises `UsageError`, or `NotAllowedError` where the requester has not shown that
    it holds the key.
    """
    check_private_options(options)
    claim = options.private
    if claim is None:
        return None
    texts = (claimed_text(credential, options.name) for credential in {grant.name, ""})
    if not any(is_signed_by(claim.public_key, text, claim.signature) for text in texts):
        raise NotAllowedError(
            f"the signature in private= does not fit the credential {grant.name!r} and the name {options.name!r}: sign "
            "the text of tunneld-control(7) with the key of the node"
        )
    return Private(claim.node, options.name)


def _check_room(settings: TunnelSettings, count: int) -> None:
    if count >= settings.max_tunnels:
        raise LimitReachedError(
            f"tunnel limit reached: the relay has {count} of {settings.max_tunnels} open (tunnels.max_tunnels)"
        )


def _reachable(bound: str, requester: Requester) -> str:
    """The host to advertise where none is configured: the bound address, or, for a wildcard, the one that the requester
    connected to.
    """
    return requester.local_host if is_wildcard(bound) else bound
