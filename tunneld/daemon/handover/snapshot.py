"""The description of what one process leaves to the next: lines of JSON, strictly read.

    header                    version, time, faces, what was counted
    a tunnel                  a line each: one that does not fit costs itself, its sockets are closed, the rest goes on
    (empty)
    octets on their way       to which the relays point

Times are seconds before the moment of the header, whose clock (CLOCK_MONOTONIC) both processes share: the time in
between passes for timers, too.
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
from tunneld.policy.options import TunnelOptions
from tunneld.tunnel.server_side import ServerSideSnapshot
from tunneld.tunnel.snapshot import (
    ClientSideSnapshot,
    ServiceCounters,
    ServiceSnapshot,
    TunnelCounters,
    TunnelSnapshot,
    WaitingVisitor,
)
from tunneld.tunnel.spec import TunnelSpec

log = structlog.get_logger("handover")

VERSION: Literal[1] = 1
"""Of the format. Another number, and nothing of a letter is read."""

Inode = Annotated[int, Field(ge=1)]
Octets = Annotated[int, Field(ge=0)]
Peer = tuple[str, int] | tuple[str, int, int, int]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class _HeaderRecord(_Record):
    version: Literal[1]
    stamp: float  # CLOCK_MONOTONIC
    fds: tuple[int, ...]  # the numbers under which a process that becomes another one leaves them open
    faces: dict[str, tuple[Inode, ...]]
    given: tuple[str, ...]
    past: ServiceCounters


class _FlowRecord(_Record):
    moved: Octets
    done: bool
    held: tuple[Octets, Octets]


class _RelayRecord(_Record):
    visitor: Inode
    server: Inode
    peer: Peer
    up: _FlowRecord
    down: _FlowRecord
    linger: float
    rest: float | None


class _WaitingRecord(_Record):
    visitor: Inode
    peer: Peer
    reached: Peer | None
    patience: float


class _ClientSideRecord(_Record):
    port: int
    listener: Inode | None
    waiting: tuple[_WaitingRecord, ...]


class _ServerSideRecord(_Record):
    port: int
    listener: Inode | None
    key: str
    parked: tuple[tuple[Inode, Peer], ...]


class _TunnelRecord(_Record):
    id: str
    credential: str
    backend: str
    options: dict[str, str]
    settings: TunnelSettings
    owner: str
    asker: str
    advertised_host: str
    asked_from: str = ""  # `server_from` as it was asked for
    draining: bool
    account: TunnelCounters
    client: _ClientSideRecord
    server: _ServerSideRecord
    relays: tuple[_RelayRecord, ...]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that a process leaves: the listeners of its faces, by their names, and the tunnels."""

    listeners: Mapping[str, Sequence[socket.socket]] = field(default_factory=dict)
    given: frozenset[str] = frozenset()  # the faces among them whose listeners were systemd's, and still are
    service: ServiceSnapshot = field(default_factory=ServiceSnapshot)

    @property
    def relays(self) -> int:
        """How many go along."""
        return sum(len(legacy.relays) for _owner, legacy in self.service.tunnels)


def pack(estate: Snapshot, baggage: FdBundle) -> tuple[bytes, int]:
    """The letter, whose sockets are in the baggage; and how many connections found no room there and were closed."""
    faces = {face: tuple(map(baggage.put, listeners)) for face, listeners in estate.listeners.items()}
    tunnels = [(_Packing(baggage), credential, legacy) for credential, legacy in estate.service.tunnels]
    described = [packing.tunnel(credential, legacy) for packing, credential, legacy in tunnels]  # listeners come first
    lines = [
        one.model_copy(update={"relays": packing.relays(legacy)})
        for one, (packing, _credential, legacy) in zip(described, tunnels, strict=True)
    ]
    fds = tuple(packed.fileno() for packed in baggage.sockets)
    given = tuple(sorted(estate.given))
    header = _HeaderRecord(
        version=VERSION, stamp=time.monotonic(), fds=fds, faces=faces, given=given, past=estate.service.counters
    )
    letter = b"\n".join([*(line.model_dump_json().encode() for line in (header, *lines)), b"", b""])
    return letter, sum(packing.closed for packing, _credential, _legacy in tunnels)


def fds_of(letter: bytes) -> tuple[int, ...]:
    """The descriptors that a letter of this process before its execve names. Raises `ValueError`."""
    return _header(letter).fds


def unpack(letter: bytes, baggage: FdBundle) -> Snapshot:
    """What a letter describes, with the sockets out of the baggage, which keeps those that it does not.

    Raises `ValueError` where nothing of it can be used. A tunnel that does not fit is logged.
    """
    header = _header(letter)
    lines, _, held = letter.partition(b"\n\n")
    baggage.held[:] = held
    gap = max(0.0, time.monotonic() - header.stamp)
    tunnels = []
    for line in lines.split(b"\n")[1:]:
        try:
            described = _TunnelRecord.model_validate_json(line)
            with baggage.all_or_nothing():
                tunnels.append((described.credential, _Unpacking(baggage, gap).tunnel(described)))
        except (ValidationError, UsageError, MissingError) as error:
            log.warning("tunnel could not be taken over", tunnel=_id_in(line), reason=_first_line(error))
    faces = {face: baggage.take_all(inodes) for face, inodes in header.faces.items()}
    return Snapshot(faces, frozenset(header.given), ServiceSnapshot(header.past, tunnels))


def _header(letter: bytes) -> _HeaderRecord:
    line = letter.partition(b"\n")[0]
    try:
        version = json.loads(line)["version"]
    except (ValueError, KeyError, TypeError):
        raise ValueError("it is not a letter of tunneld") from None
    if version != VERSION:
        raise ValueError(f"its format is {version!r}, and this tunneld reads {VERSION}")
    try:
        return _HeaderRecord.model_validate_json(line)
    except ValidationError as error:
        raise ValueError(_first_line(error)) from None


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
    """One tunnel on its way into the baggage. What finds no room is closed, and counted."""

    def __init__(self, baggage: FdBundle) -> None:
        self.closed = 0
        self._baggage = baggage

    def tunnel(self, credential: str, legacy: TunnelSnapshot) -> _TunnelRecord:
        opening, client, server = legacy.spec, legacy.client, legacy.server
        return _TunnelRecord(
            id=opening.id,
            credential=credential,
            backend=opening.backend,
            options=opening.options.words(),
            settings=opening.settings,
            owner=opening.owner,
            asker=opening.requester_host,
            advertised_host=opening.advertised_host,
            asked_from=str(opening.asked_from or ""),
            draining=legacy.draining,
            account=legacy.counters,
            client=_ClientSideRecord(
                port=client.port, listener=self._listener(client.listener), waiting=self._line(client)
            ),
            server=_ServerSideRecord(
                port=server.port, listener=self._listener(server.listener), key=server.key, parked=self._parked(server)
            ),
            relays=(),
        )

    def relays(self, legacy: TunnelSnapshot) -> tuple[_RelayRecord, ...]:
        return tuple(
            _RelayRecord(
                visitor=self._baggage.put(lifted.visitor),
                server=self._baggage.put(lifted.server),
                peer=peer,
                up=self._course(lifted.up),
                down=self._course(lifted.down),
                linger=lifted.linger,
                rest=lifted.rest,
            )
            for lifted, peer in legacy.relays
            if self._has_room(lifted.visitor, lifted.server, octets=len(lifted.up.held) + len(lifted.down.held))
        )

    def _listener(self, listener: socket.socket | None) -> int | None:
        return None if listener is None else self._baggage.put(listener)

    def _line(self, client: ClientSideSnapshot) -> tuple[_WaitingRecord, ...]:
        return tuple(
            _WaitingRecord(
                visitor=self._baggage.put(one.visitor),
                peer=one.peer,
                reached=one.destination,
                patience=one.seconds_left,
            )
            for one in client.waiting
            if self._has_room(one.visitor)
        )

    def _parked(self, server: ServerSideSnapshot) -> tuple[tuple[int, Peer], ...]:
        return tuple((self._baggage.put(one), peer) for one, peer in server.parked if self._has_room(one))

    def _has_room(self, *sockets: socket.socket, octets: int = 0) -> bool:
        if self._baggage.has_room(len(sockets), octets):
            return True
        for one in sockets:
            one.close()
        self.closed += 1
        return False

    def _course(self, course: FlowState) -> _FlowRecord:
        return _FlowRecord(moved=course.moved, done=course.done, held=self._baggage.hold(course.held))


class _Unpacking:
    """One tunnel out of the baggage. Connections that have not come along are passed over; a listener must have."""

    def __init__(self, baggage: FdBundle, gap: float) -> None:
        self._baggage = baggage
        self._gap = gap  # seconds since the letter was written

    def tunnel(self, described: _TunnelRecord) -> TunnelSnapshot:
        client, server, account = described.client, described.server, described.account
        opening = TunnelSpec(
            id=described.id,
            backend=described.backend,
            options=TunnelOptions.parse(described.options),
            settings=described.settings,
            owner=described.owner,
            requester_host=described.asker,
            advertised_host=described.advertised_host,
            asked_from=TunnelOptions.parse({"server_from": described.asked_from}).server_from
            if described.asked_from
            else None,
        )
        return TunnelSnapshot(
            spec=opening,
            draining=described.draining,
            counters=replace(account, age=account.age + self._gap, idle=account.idle + self._gap),
            client=ClientSideSnapshot(client.port, self._listener(client.listener), self._line(client)),
            server=ServerSideSnapshot(server.port, self._listener(server.listener), self._parked(server), server.key),
            relays=[(self._relay(one), one.peer) for one in described.relays if self._has(one.visitor, one.server)],
        )

    def _has(self, *inodes: int) -> bool:
        return all(inode in self._baggage for inode in inodes)

    def _left(self, seconds: float) -> float:
        return max(0.0, seconds - self._gap)

    def _listener(self, inode: int | None) -> socket.socket | None:
        return None if inode is None else self._baggage.take(inode)

    def _line(self, client: _ClientSideRecord) -> list[WaitingVisitor]:
        take, left = self._baggage.take, self._left
        return [
            WaitingVisitor(take(one.visitor), one.peer, one.reached, left(one.patience))
            for one in client.waiting
            if self._has(one.visitor)
        ]

    def _parked(self, server: _ServerSideRecord) -> list[tuple[socket.socket, Peer]]:
        return [(self._baggage.take(inode), peer) for inode, peer in server.parked if self._has(inode)]

    def _relay(self, described: _RelayRecord) -> RelayState:
        return RelayState(
            self._baggage.take(described.visitor),
            self._baggage.take(described.server),
            self._course(described.up),
            self._course(described.down),
            described.linger,
            None if described.rest is None else self._left(described.rest),
        )

    def _course(self, described: _FlowRecord) -> FlowState:
        return FlowState(described.moved, described.done, self._baggage.take_held(described.held))
