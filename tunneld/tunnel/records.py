"""The records of visitors: a line of JSON for each visitor that has left, in the file `records.file`.

    {"time": "2026-11-30T17:04:23.120Z", "began": "2026-11-30T17:04:11.020Z", "seconds": 12.1, "tunnel": "t4",
     "name": "blog", "owner": "home", "visitor": "192.0.2.7:51311", "address": "blog.example.org", "up": 79,
     "down": 5120, "reason": "both sides finished"}

While there is no file, visitors cost nothing more: nothing is made, and nothing is called for one. The lines are
written as in line_log.py, so that a slow disk never delays a visitor.
"""

from __future__ import annotations

import ipaddress
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, Protocol

import trio

from tunneld.line_log import LineLog, LogTarget
from tunneld.net.endpoint import Peer, format_peer
from tunneld.tunnel.events import VisitorRecorder
from tunneld.tunnel.spec import TunnelSpec
from tunneld.tunnel.visitor import RelayedVisitor

PREFIX_LENGTHS = {4: 24, 6: 48}
"""Bits of an address that are kept with `addresses = "network"`: of IPv4 a network of 256, of IPv6 one site."""


class RecordSettings(Protocol):
    """What is read of `[records]`."""

    @property
    def file(self) -> Path | None: ...
    @property
    def addresses(self) -> Literal["full", "network", "none"]: ...


@dataclass(frozen=True, slots=True)
class VisitorRecord:
    """A visitor that has left."""

    spec: TunnelSpec
    visitor: RelayedVisitor
    up: int
    down: int
    reason: str  # why it left
    ended_at: float  # seconds since 1970
    seconds: float  # that it was connected


class VisitorRecords(LineLog[VisitorRecord]):
    """Keeps the records."""

    def __init__(self, settings: Callable[[], RecordSettings]) -> None:
        self._settings = settings
        super().__init__("visitor records", self._current_target)

    @property
    def recorder(self) -> VisitorRecorder | None:
        """What records visitors with these settings; None: nothing does."""
        return self._record if self._settings().file is not None else None

    def _record(self, spec: TunnelSpec, visitor: RelayedVisitor, up: int, down: int, reason: str) -> None:
        seconds = trio.current_time() - visitor.since
        self.put(VisitorRecord(spec, visitor, up, down, reason, time.time(), seconds))

    def _current_target(self) -> LogTarget[VisitorRecord] | None:
        settings = self._settings()
        if settings.file is None:
            return None
        addresses = settings.addresses
        return LogTarget(settings.file, lambda record: json.dumps(facts(record, addresses)) + "\n")


def facts(record: VisitorRecord, addresses: Literal["full", "network", "none"]) -> dict[str, object]:
    """The facts of the line. What is not known is left out."""
    spec, visitor = record.spec, record.visitor
    found = {
        "time": _iso(record.ended_at),
        "began": _iso(record.ended_at - record.seconds),
        "seconds": round(record.seconds, 3),
        "tunnel": spec.id,
        "name": spec.options.name or None,
        "owner": spec.credential or spec.requester_host,
        "visitor": {"full": format_peer, "network": _network, "none": _nothing}[addresses](visitor.peer),
        "credential": visitor.credential,
        "address": _address(spec, visitor),
        "up": record.up,
        "down": record.down,
        "reason": record.reason,
    }
    return {key: value for key, value in found.items() if value is not None}


def _address(spec: TunnelSpec, visitor: RelayedVisitor) -> str | None:
    """What the visitor connected to: a host name, a private tunnel, or an address of this machine with its port."""
    if visitor.host is not None or spec.private is not None:
        return str(visitor.host or spec.private)
    return format_peer(visitor.reached) if visitor.reached is not None else None


def _network(peer: Peer) -> str | None:
    try:
        address = ipaddress.ip_address(peer[0].partition("%")[0])
    except ValueError:  # a Unix socket
        return None
    return str(ipaddress.ip_network((address, PREFIX_LENGTHS[address.version]), strict=False))


def _nothing(_peer: Peer) -> None:
    return None


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
