"""The manifest: JSON lines that describe what one process hands over to the next. They are parsed strictly.

    header              version, time, listeners, counters
    tunnel              one line for each; if one is invalid, that tunnel is lost and the rest is used
    (empty line)
    buffered bytes      to which relayed connections refer by offset and length

Times are in seconds, relative to the time in the header. Both processes share its clock, CLOCK_MONOTONIC, so timers
account for the time that the handover takes.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import structlog
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tunneld.config.schema import TunnelSettings
from tunneld.daemon.handover.bundle import FdBundle, MissingError
from tunneld.engine.handover import FlowState, RelayState
from tunneld.errors import UsageError
from tunneld.net.address import HostName, parse_address, parse_host_name
from tunneld.net.endpoint import Peer
from tunneld.policy.options import TunnelOptions
from tunneld.tunnel.server_side import ServerSideSnapshot
from tunneld.tunnel.snapshot import (
    IngressSnapshot,
    QuarantinedPort,
    ServiceCounters,
    ServiceSnapshot,
    TunnelCounters,
    TunnelSnapshot,
    WaitingVisitor,
)
from tunneld.tunnel.spec import TunnelSpec
from tunneld.tunnel.visitor import Visitor

log = structlog.get_logger("handover")

VERSION: Literal[2] = 2
"""Version of the format. One of version 1 is read, too, so that an update keeps connections: there, a tunnel had one
port, and with it the waiting visitors, in `client`. A manifest of any other version is not used.
"""

Inode = Annotated[int, Field(ge=1)]
ByteCount = Annotated[int, Field(ge=0)]


class _ManifestRecord(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class _HeaderRecord(_ManifestRecord):
    version: Literal[1, 2]
    stamp: float  # CLOCK_MONOTONIC
    fds: tuple[int, ...]  # numbers of the descriptors, which stay the same over execve
    listeners: dict[str, tuple[Inode, ...]]  # by service
    activated: tuple[str, ...]  # services with listeners of systemd
    counters: ServiceCounters
    quarantined: tuple[QuarantinedPort, ...] = ()


class _FlowRecord(_ManifestRecord):
    moved: ByteCount
    done: bool
    held: tuple[ByteCount, ByteCount]  # offset and length


class _RelayRecord(_ManifestRecord):
    visitor: Inode
    server: Inode
    peer: Peer
    up: _FlowRecord
    down: _FlowRecord
    linger: float
    time_left: float | None  # seconds until the linger timeout, if it runs


class _WaitingRecord(_ManifestRecord):
    visitor: Inode
    peer: Peer
    reached: Peer | None
    host: str | None = None
    credential: str | None = None
    early: tuple[ByteCount, ByteCount] = (0, 0)  # offset and length
    time_left: float  # seconds until the pairing timeout


class _IngressRecord(_ManifestRecord):
    address: str
    listener: Inode | None


class _ServerSideRecord(_ManifestRecord):
    port: int
    listener: Inode | None
    key: str
    scheme: str = ""  # of the server URI with the key; earlier versions do not write it
    parked: tuple[tuple[Inode, Peer], ...]


class _TunnelRecord(_ManifestRecord):
    id: str
    credential: str
    backend: str
    options: dict[str, str]
    settings: TunnelSettings
    owner: str
    requester_host: str
    advertised_host: str
    requested_server_from: str = ""  # `server_from` as requested, before the limits of the credential
    uid: str = ""
    generation: int = 1
    draining: bool
    counters: TunnelCounters
    ingresses: Annotated[tuple[_IngressRecord, ...], Field(min_length=1)]
    waiting: tuple[_WaitingRecord, ...]
    server: _ServerSideRecord
    relays: tuple[_RelayRecord, ...]


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
    header = _HeaderRecord(
        version=VERSION,
        stamp=time.monotonic(),
        fds=tuple(packed.fileno() for packed in bundle.sockets),
        listeners=listeners,
        activated=tuple(sorted(snapshot.activated)),
        counters=snapshot.service.counters,
        quarantined=tuple(snapshot.service.quarantined),
    )
    manifest = b"\n".join([*(line.model_dump_json().encode() for line in (header, *lines)), b"", b""])
    return manifest, sum(packing.closed for packing, _credential, _tunnel in tunnels)


def fds_of(manifest: bytes) -> tuple[int, ...]:
    """Return the descriptors in a manifest that this process wrote before its execve. Raises `ValueError`."""
    return _header(manifest).fds


def unpack(manifest: bytes, bundle: FdBundle) -> Snapshot:
    """Rebuild the snapshot that a manifest describes, taking its sockets out of the bundle.

    A tunnel that is invalid is logged, and its sockets stay in the bundle. Raises `ValueError` if the header is.
    """
    header = _header(manifest)
    lines, _, held = manifest.partition(b"\n\n")
    bundle.held[:] = held
    gap = max(0.0, time.monotonic() - header.stamp)
    tunnels = []
    for line in lines.split(b"\n")[1:]:
        try:
            described = _TunnelRecord.model_validate_json(line if header.version == VERSION else _converted(line))
            with bundle.all_or_nothing():
                tunnels.append((described.credential, _Unpacking(bundle, gap).tunnel(described)))
        except (ValidationError, UsageError, MissingError) as error:
            log.warning("tunnel could not be taken over", tunnel=_id_in(line), reason=_first_line(error))
    listeners = {service: bundle.take_all(inodes) for service, inodes in header.listeners.items()}
    quarantined = [(port, owner, seconds + gap) for port, owner, seconds in header.quarantined]
    return Snapshot(listeners, frozenset(header.activated), ServiceSnapshot(header.counters, tunnels, quarantined))


def _header(manifest: bytes) -> _HeaderRecord:
    line = manifest.partition(b"\n")[0]
    try:
        version = json.loads(line)["version"]
    except (ValueError, KeyError, TypeError):
        raise ValueError("it is not a manifest of tunneld") from None
    if version not in {1, VERSION}:
        raise ValueError(f"its format is version {version!r}; this program reads versions 1 to {VERSION}")
    try:
        return _HeaderRecord.model_validate_json(line)
    except ValidationError as error:
        raise ValueError(_first_line(error)) from None


def _converted(line: bytes) -> bytes:
    """The line of a tunnel of version 1 in the present version. Raises `MissingError` where it is not one."""
    try:
        tunnel = json.loads(line)
        client = tunnel.pop("client")
        ingress = {"address": str(client["port"]), "listener": client["listener"]}
        return json.dumps({**tunnel, "ingresses": [ingress], "waiting": client["waiting"]}).encode()
    except (ValueError, KeyError, TypeError, AttributeError):
        raise MissingError("its port is not described") from None


def _id_in(line: bytes) -> str:
    try:
        return str(json.loads(line)["id"])
    except (ValueError, KeyError, TypeError):
        return "?"


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return str(error)


class _Packing:
    """Puts one tunnel into the bundle. Connections that do not fit are closed and counted."""

    def __init__(self, bundle: FdBundle) -> None:
        self.closed = 0
        self._bundle = bundle

    def tunnel(self, credential: str, snapshot: TunnelSnapshot) -> _TunnelRecord:
        spec, server = snapshot.spec, snapshot.server
        return _TunnelRecord(
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
            draining=snapshot.draining,
            counters=snapshot.counters,
            ingresses=tuple(
                _IngressRecord(address=str(one.address), listener=self._listener(one.listener))
                for one in snapshot.ingresses
            ),
            waiting=self._waiting(snapshot.waiting),
            server=_ServerSideRecord(
                port=server.port,
                listener=self._listener(server.listener),
                key=server.key,
                scheme=server.scheme,
                parked=self._parked(server),
            ),
            relays=(),
        )

    def relays(self, snapshot: TunnelSnapshot) -> tuple[_RelayRecord, ...]:
        return tuple(
            _RelayRecord(
                visitor=self._bundle.put(relay.visitor),
                server=self._bundle.put(relay.server),
                peer=peer,
                up=self._flow(relay.up),
                down=self._flow(relay.down),
                linger=relay.linger,
                time_left=relay.rest,
            )
            for relay, peer in snapshot.relays
            if self._has_room(relay.visitor, relay.server, size=len(relay.up.held) + len(relay.down.held))
        )

    def _listener(self, listener: socket.socket | None) -> int | None:
        return None if listener is None else self._bundle.put(listener)

    def _waiting(self, waiting: Sequence[WaitingVisitor]) -> tuple[_WaitingRecord, ...]:
        return tuple(
            _WaitingRecord(
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

    def _flow(self, flow: FlowState) -> _FlowRecord:
        return _FlowRecord(moved=flow.moved, done=flow.done, held=self._bundle.hold(flow.held))


class _Unpacking:
    """Takes one tunnel out of the bundle. Connections that were not received are skipped; listeners are required."""

    def __init__(self, bundle: FdBundle, gap: float) -> None:
        self._bundle = bundle
        self._gap = gap  # seconds since the manifest was written

    def tunnel(self, described: _TunnelRecord) -> TunnelSnapshot:
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
            relays=[(self._relay(one), one.peer) for one in described.relays if self._has(one.visitor, one.server)],
        )

    def _has(self, *inodes: int) -> bool:
        return all(inode in self._bundle for inode in inodes)

    def _left(self, seconds: float) -> float:
        return max(0.0, seconds - self._gap)

    def _listener(self, inode: int | None) -> socket.socket | None:
        return None if inode is None else self._bundle.take(inode)

    def _waiting(self, waiting: Sequence[_WaitingRecord]) -> list[WaitingVisitor]:
        return [
            WaitingVisitor(self._visitor(one), self._left(one.time_left)) for one in waiting if self._has(one.visitor)
        ]

    def _visitor(self, described: _WaitingRecord) -> Visitor:
        return Visitor(
            end=self._bundle.take(described.visitor),
            peer=described.peer,
            reached=described.reached,
            host=parse_host_name(described.host) if described.host is not None else None,
            credential=described.credential,
            early=self._bundle.take_held(described.early),
        )

    def _parked(self, server: _ServerSideRecord) -> list[tuple[socket.socket, Peer]]:
        return [(self._bundle.take(inode), peer) for inode, peer in server.parked if self._has(inode)]

    def _relay(self, described: _RelayRecord) -> RelayState:
        return RelayState(
            self._bundle.take(described.visitor),
            self._bundle.take(described.server),
            self._flow(described.up),
            self._flow(described.down),
            described.linger,
            None if described.time_left is None else self._left(described.time_left),
        )

    def _flow(self, described: _FlowRecord) -> FlowState:
        return FlowState(described.moved, described.done, self._bundle.take_held(described.held))
