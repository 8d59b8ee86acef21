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
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tunneld.config.schema import TunnelSettings
from tunneld.daemon.handover.bundle import MissingError
from tunneld.net.endpoint import Peer
from tunneld.tunnel.snapshot import QuarantinedPort, ServiceCounters, TimedBan, TunnelCounters

VERSION: Literal[2] = 2
"""Version of the format. One of version 1 is read, too, so that an update keeps connections: there, a tunnel had one
port, and with it the waiting visitors, in `client`. A manifest of any other version is not used.
"""

Inode = Annotated[int, Field(ge=1)]
ByteCount = Annotated[int, Field(ge=0)]


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class HeaderEntry(_Entry):
    """The first line."""

    version: Literal[1, 2]
    stamp: float  # CLOCK_MONOTONIC
    fds: tuple[int, ...]  # numbers of the descriptors, which stay the same over execve
    listeners: dict[str, tuple[Inode, ...]]  # by service
    activated: tuple[str, ...]  # services with listeners of systemd
    counters: ServiceCounters
    quarantined: tuple[QuarantinedPort, ...] = ()
    bans: tuple[TimedBan, ...] = ()


class FlowEntry(_Entry):
    """One direction of a relayed connection."""

    moved: ByteCount
    done: bool
    held: tuple[ByteCount, ByteCount]  # offset and length


class RelayEntry(_Entry):
    """A relayed connection."""

    visitor: Inode
    server: Inode
    peer: Peer
    up: FlowEntry
    down: FlowEntry
    linger: float
    time_left: float | None  # seconds until the linger timeout, if it runs
    age: float = 0.0  # earlier versions do not write this and what follows
    reached: Peer | None = None
    host: str | None = None
    credential: str | None = None


class WaitingEntry(_Entry):
    """A visitor that waits for a server connection."""

    visitor: Inode
    peer: Peer
    reached: Peer | None
    host: str | None = None
    credential: str | None = None
    early: tuple[ByteCount, ByteCount] = (0, 0)  # offset and length
    time_left: float  # seconds until the pairing timeout


class IngressEntry(_Entry):
    """Where visitors come from."""

    address: str
    listener: Inode | None


class ServerSideEntry(_Entry):
    """The server side of a tunnel, and its parked connections."""

    port: int
    listener: Inode | None
    key: str
    scheme: str = ""  # of the server URI with the key; earlier versions do not write it
    parked: tuple[tuple[Inode, Peer], ...]


class TunnelEntry(_Entry):
    """The line of a tunnel."""

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
    changed: tuple[str, ...] = ()
    draining: bool
    counters: TunnelCounters
    ingresses: Annotated[tuple[IngressEntry, ...], Field(min_length=1)]
    waiting: tuple[WaitingEntry, ...]
    server: ServerSideEntry
    relays: tuple[RelayEntry, ...]


def read_header(manifest: bytes) -> HeaderEntry:
    """Read the header. Raises `ValueError`."""
    line = manifest.partition(b"\n")[0]
    try:
        version = json.loads(line)["version"]
    except (ValueError, KeyError, TypeError):
        raise ValueError("it is not a manifest of tunneld") from None
    if version not in {1, VERSION}:
        raise ValueError(f"its format is version {version!r}; this program reads versions 1 to {VERSION}")
    try:
        return HeaderEntry.model_validate_json(line)
    except ValidationError as error:
        raise ValueError(first_line(error)) from None


def convert(line: bytes) -> bytes:
    """The line of a tunnel of version 1 in the present version. Raises `MissingError` where it is not one."""
    try:
        tunnel = json.loads(line)
        client = tunnel.pop("client")
        ingress = {"address": str(client["port"]), "listener": client["listener"]}
        return json.dumps({**tunnel, "ingresses": [ingress], "waiting": client["waiting"]}).encode()
    except (ValueError, KeyError, TypeError, AttributeError):
        raise MissingError("its port is not described") from None


def id_in(line: bytes) -> str:
    """The id of a tunnel in a line that may be invalid, for the log."""
    try:
        return str(json.loads(line)["id"])
    except (ValueError, KeyError, TypeError):
        return "?"


def first_line(error: Exception) -> str:
    """An error in one line: of several mistakes the first."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return str(error)
