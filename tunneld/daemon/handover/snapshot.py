"""Puts what one process hands over into a bundle of descriptors and a manifest, and takes it out in the next."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import structlog
from pydantic import ValidationError

from tunneld.daemon.handover.bundle import FdBundle, MissingError
from tunneld.daemon.handover.manifest import (
    VERSION,
    FlowEntry,
    HeaderEntry,
    IngressEntry,
    RelayEntry,
    ServerSideEntry,
    TunnelEntry,
    WaitingEntry,
    convert,
    first_line,
    id_in,
    read_header,
)
from tunneld.engine.handover import FlowState, RelayState
from tunneld.errors import UsageError
from tunneld.net.address import HostName, parse_address, parse_host_name
from tunneld.net.endpoint import Peer
from tunneld.policy.options import TunnelOptions
from tunneld.tunnel.server_side import ServerSideSnapshot
from tunneld.tunnel.snapshot import (
    IngressSnapshot,
    RelaySnapshot,
    ServiceSnapshot,
    TunnelSnapshot,
    WaitingVisitor,
)
from tunneld.tunnel.spec import TunnelSpec
from tunneld.tunnel.visitor import Visitor

log = structlog.get_logger("handover")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything that a process hands over: the listeners of its services, and the tunnels."""

    listeners: Mapping[str, Sequence[socket.socket]] = field(default_factory=dict)
    activated: frozenset[str] = frozenset()  # services with listeners that systemd opened, and still has open
    service: ServiceSnapshot = field(default_factory=ServiceSnapshot)

    @property
    def relays(self) -> int:
        """How many relayed connections there are."""
        return sum(len(tunnel.relays) for _credential, tunnel in self.service.tunnels)


def pack(snapshot: Snapshot, bundle: FdBundle) -> tuple[bytes, int]:
    """Put the sockets of a snapshot into the bundle. Returns the manifest, and the number of connections that did not
    fit and were closed.
    """
    listeners = {service: tuple(map(bundle.put, sockets)) for service, sockets in snapshot.listeners.items()}
    tunnels = [(_Packing(bundle), credential, tunnel) for credential, tunnel in snapshot.service.tunnels]
    described = [packing.tunnel(credential, tunnel) for packing, credential, tunnel in tunnels]  # listeners come first
    lines = [
        one.model_copy(update={"relays": packing.relays(tunnel)})
        for one, (packing, _credential, tunnel) in zip(described, tunnels, strict=True)
    ]
    header = HeaderEntry(
        version=VERSION,
        stamp=time.monotonic(),
        fds=tuple(packed.fileno() for packed in bundle.sockets),
        listeners=listeners,
        activated=tuple(sorted(snapshot.activated)),
        counters=snapshot.service.counters,
        quarantined=tuple(snapshot.service.quarantined),
        bans=tuple(snapshot.service.bans),
    )
    manifest = b"\n".join([*(line.model_dump_json().encode() for line in (header, *lines)), b"", b""])
    return manifest, sum(packing.closed for packing, _credential, _tunnel in tunnels)


def fds_of(manifest: bytes) -> tuple[int, ...]:
    """Return the descriptors in a manifest that this process wrote before its execve. Raises `ValueError`."""
    return read_header(manifest).fds


def unpack(manifest: bytes, bundle: FdBundle) -> Snapshot:
    """Rebuild the snapshot that a manifest describes, taking its sockets out of the bundle.

    A tunnel that is invalid is logged, and its sockets stay in the bundle. Raises `ValueError` if the header is.
    """
    header = read_header(manifest)
    lines, _, held = manifest.partition(b"\n\n")
    bundle.held[:] = held
    gap = max(0.0, time.monotonic() - header.stamp)
    tunnels = []
    for line in lines.split(b"\n")[1:]:
        try:
            described = TunnelEntry.model_validate_json(line if header.version == VERSION else convert(line))
            with bundle.all_or_nothing():
                tunnels.append((described.credential, _Unpacking(bundle, gap).tunnel(described)))
        except (ValidationError, UsageError, MissingError) as error:
            log.warning("tunnel could not be taken over", tunnel=id_in(line), reason=first_line(error))
    listeners = {service: bundle.take_all(inodes) for service, inodes in header.listeners.items()}
    quarantined = [(port, owner, seconds + gap) for port, owner, seconds in header.quarantined]
    bans = [(network, left - gap) for network, left in header.bans]
    service = ServiceSnapshot(header.counters, tunnels, quarantined, bans)
    return Snapshot(listeners, frozenset(header.activated), service)


class _Packing:
    """Puts one tunnel into the bundle. Connections that do not fit are closed and counted."""

    def __init__(self, bundle: FdBundle) -> None:
        self.closed = 0
        self._bundle = bundle

    def tunnel(self, credential: str, snapshot: TunnelSnapshot) -> TunnelEntry:
        spec, server = snapshot.spec, snapshot.server
        return TunnelEntry(
            id=spec.id,
            credential=credential,
            backend=spec.backend,
            options=spec.options.words(),
            settings=spec.settings,
            owner=spec.owner,
            requester_host=spec.requester_host,
            advertised_host=spec.advertised_host,
            requested_server_from=str(spec.asked_from or ""),
            uid=spec.uid,
            generation=spec.generation,
            changed=tuple(sorted(spec.changed)),
            draining=snapshot.draining,
            counters=snapshot.counters,
            ingresses=tuple(
                IngressEntry(address=str(one.address), listener=self._listener(one.listener))
                for one in snapshot.ingresses
            ),
            waiting=self._waiting(snapshot.waiting),
            server=ServerSideEntry(
                port=server.port,
                listener=self._listener(server.listener),
                key=server.key,
                scheme=server.scheme,
                parked=self._parked(server),
            ),
            relays=(),
        )

    def relays(self, snapshot: TunnelSnapshot) -> tuple[RelayEntry, ...]:
        return tuple(
            RelayEntry(
                visitor=self._bundle.put(relay.visitor),
                server=self._bundle.put(relay.server),
                peer=one.peer,
                up=self._flow(relay.up),
                down=self._flow(relay.down),
                linger=relay.linger,
                time_left=relay.rest,
                age=one.age,
                reached=one.reached,
                host=str(one.host) if one.host is not None else None,
                credential=one.credential,
            )
            for one in snapshot.relays
            if self._has_room(
                (relay := one.state).visitor, relay.server, size=len(relay.up.held) + len(relay.down.held)
            )
        )

    def _listener(self, listener: socket.socket | None) -> int | None:
        return None if listener is None else self._bundle.put(listener)

    def _waiting(self, waiting: Sequence[WaitingVisitor]) -> tuple[WaitingEntry, ...]:
        return tuple(
            WaitingEntry(
                visitor=self._bundle.put(one.visitor.connection),
                peer=one.visitor.peer,
                reached=one.visitor.reached,
                host=str(one.visitor.host) if one.visitor.host is not None else None,
                credential=one.visitor.credential,
                early=self._bundle.hold(one.visitor.early),
                time_left=one.seconds_left,
            )
            for one in waiting
            if self._has_room(one.visitor.connection, size=len(one.visitor.early))
        )

    def _parked(self, server: ServerSideSnapshot) -> tuple[tuple[int, Peer], ...]:
        return tuple((self._bundle.put(one), peer) for one, peer in server.parked if self._has_room(one))

    def _has_room(self, *sockets: socket.socket, size: int = 0) -> bool:
        if self._bundle.has_room(len(sockets), size):
            return True
        for one in sockets:
            one.close()
        self.closed += 1
        return False

    def _flow(self, flow: FlowState) -> FlowEntry:
        return FlowEntry(moved=flow.moved, done=flow.done, held=self._bundle.hold(flow.held))


class _Unpacking:
    """Takes one tunnel out of the bundle. Connections that were not received are skipped; listeners are required."""

    def __init__(self, bundle: FdBundle, gap: float) -> None:
        self._bundle = bundle
        self._gap = gap  # seconds since the manifest was written

    def tunnel(self, described: TunnelEntry) -> TunnelSnapshot:
        server, counters = described.server, described.counters
        ingresses = [
            IngressSnapshot(parse_address(one.address), self._listener(one.listener)) for one in described.ingresses
        ]
        spec = TunnelSpec(
            id=described.id,
            backend=described.backend,
            options=TunnelOptions.parse(described.options),
            settings=described.settings,
            owner=described.owner,
            requester_host=described.requester_host,
            advertised_host=described.advertised_host,
            asked_from=TunnelOptions.parse({"server_from": described.requested_server_from}).server_from
            if described.requested_server_from
            else None,
            uid=described.uid,
            generation=described.generation,
            changed=frozenset(described.changed),
            names=tuple(one.address for one in ingresses if isinstance(one.address, HostName)),
            credential=described.credential,
        )
        return TunnelSnapshot(
            spec=spec,
            draining=described.draining,
            counters=replace(counters, age=counters.age + self._gap, idle=counters.idle + self._gap),
            ingresses=ingresses,
            waiting=self._waiting(described.waiting),
            server=ServerSideSnapshot(
                server.port, self._listener(server.listener), self._parked(server), server.key, server.scheme
            ),
            relays=[self._relay(one) for one in described.relays if self._has(one.visitor, one.server)],
        )

    def _has(self, *inodes: int) -> bool:
        return all(inode in self._bundle for inode in inodes)

    def _left(self, seconds: float) -> float:
        return max(0.0, seconds - self._gap)

    def _listener(self, inode: int | None) -> socket.socket | None:
        return None if inode is None else self._bundle.take(inode)

    def _waiting(self, waiting: Sequence[WaitingEntry]) -> list[WaitingVisitor]:
        return [
            WaitingVisitor(self._visitor(one), self._left(one.time_left)) for one in waiting if self._has(one.visitor)
        ]

    def _visitor(self, described: WaitingEntry) -> Visitor:
        return Visitor(
            end=self._bundle.take(described.visitor),
            peer=described.peer,
            reached=described.reached,
            host=parse_host_name(described.host) if described.host is not None else None,
            credential=described.credential,
            early=self._bundle.take_held(described.early),
        )

    def _parked(self, server: ServerSideEntry) -> list[tuple[socket.socket, Peer]]:
        return [(self._bundle.take(inode), peer) for inode, peer in server.parked if self._has(inode)]

    def _relay(self, described: RelayEntry) -> RelaySnapshot:
        state = RelayState(
            self._bundle.take(described.visitor),
            self._bundle.take(described.server),
            self._flow(described.up),
            self._flow(described.down),
            described.linger,
            None if described.time_left is None else self._left(described.time_left),
        )
        host = parse_host_name(described.host) if described.host is not None else None
        age = described.age + self._gap
        return RelaySnapshot(state, described.peer, age, described.reached, host, described.credential)

    def _flow(self, described: FlowEntry) -> FlowState:
        return FlowState(described.moved, described.done, self._bundle.take_held(described.held))
