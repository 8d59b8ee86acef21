"""Addresses that stay reserved for a tunnel while it is closed: for which holder, and until when. Pure.

    hold ──► open ──keep_until──► kept ──expires, or makes space──► dropped
               ▲                    │
               └──────── hold ──────┘    the same holder opens its tunnel again

A *holder* is a credential and the name that it gives a tunnel. Without credentials every peer may do everything, and
the requester's address takes the place of the credential. That separates well-meaning users; an attacker could close
another user's tunnel as well. A record is independent of the backend: it has the public addresses and the
complete server URI, with its key, and a backend reuses what it can of that.

Times are readings of one monotonic clock; the store, which outlives it, translates them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from heapq import heapify, heappop, heappush
from itertools import count
from typing import TypeVar

from tunneld.net.address import Address, HostName, Port
from tunneld.net.endpoint import Endpoint

SPARE_EXPIRIES = 64
"""Entries of dropped reservations that the list of expiry times may have, beyond as many as there are reservations."""


@dataclass(frozen=True, slots=True)
class ReservationKey:
    """The holder of a reservation."""

    credential: str  # empty on a relay without credentials
    name: str  # of the tunnel
    host: str = ""  # the requester's address, on a relay without credentials

    @property
    def owner(self) -> tuple[str, str]:
        """What may have at most `max_reservations_per_owner` reservations."""
        return self.credential, self.host


@dataclass(frozen=True, slots=True)
class Reservation:
    """The reserved addresses of one tunnel. `expires` is None while it is open."""

    holder: ReservationKey
    backend: str
    addresses: tuple[Address, ...]  # public ones, in the order of the tunnel's ingresses
    server: Endpoint = field(repr=False)  # with its key, a secret
    expires: float | None = None
    metered: int = 0  # bytes of its tunnels, one after another, that count against their quota

    @property
    def held(self) -> frozenset[Address]:
        """What no other tunnel gets: the public addresses, and the port of the server URI, which may be shared."""
        return frozenset((*self.addresses, Port(self.server.port)))

    @property
    def ports(self) -> frozenset[int]:
        """The ports among them."""
        return frozenset(address.number for address in self.held if isinstance(address, Port))

    @property
    def hosts(self) -> frozenset[str]:
        """The host names among them, without their paths."""
        return frozenset(address.name for address in self.addresses if isinstance(address, HostName))

    @property
    def client_port(self) -> int | None:
        """The first public port; None where visitors reach the tunnel by names alone."""
        return next((address.number for address in self.addresses if isinstance(address, Port)), None)

    @property
    def public_ports(self) -> tuple[int, ...]:
        """The public ports, in the order of the tunnel's ingresses."""
        return tuple(address.number for address in self.addresses if isinstance(address, Port))

    @property
    def public(self) -> str:
        """The public addresses, for messages."""
        return ", ".join(map(str, self.addresses))


class ReservationTable:
    """All reservations. `address in table` tells whether an address is reserved."""

    def __init__(self, changed: Callable[[ReservationKey], None] = lambda _holder: None) -> None:
        """`changed` is called with the holder of each record that was replaced or dropped."""
        self.changed = changed
        self._records: dict[ReservationKey, Reservation] = {}  # closed tunnels in the order of their closing
        self._by_address: dict[Address, dict[ReservationKey, Reservation]] = {}
        self._by_host: dict[str, dict[ReservationKey, Reservation]] = {}
        self._kept: dict[tuple[str, str], dict[ReservationKey, Reservation]] = {}  # by owner, of closed tunnels
        self._kept_ports: dict[tuple[str, str], Counter[int]] = {}  # by owner, of closed tunnels
        self._kept_count = 0
        self._expiring: list[tuple[float, int, Reservation]] = []  # a heap; records since replaced or dropped included
        self._serial = count()  # orders reservations that expire at the same time

    def __contains__(self, address: object) -> bool:
        return address in self._by_address

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[Reservation]:
        return iter(self._records.values())

    def find(self, holder: ReservationKey) -> Reservation | None:
        """The reservation of this holder."""
        return self._records.get(holder)

    def load(self, records: Iterable[Reservation]) -> None:
        """Add these without calling `changed`. Of two records with the same public address the later one is ignored."""
        for record in records:
            if not any(map(self.find_by_address, record.addresses)):
                self._put(record)

    def find_by_address(self, address: Address) -> Reservation | None:
        """The reservation of a public address."""
        return next((record for record in self.holding(address) if address in record.addresses), None)

    def holding(self, address: Address) -> Collection[Reservation]:
        """All reservations that hold this address: as a public one, or as the port of the server URI."""
        return self._by_address.get(address, {}).values()

    def of_host(self, name: str) -> Collection[Reservation]:
        """All reservations of a host name, for any path."""
        return self._by_host.get(name, {}).values()

    def kept_by(self, owner: tuple[str, str]) -> Collection[Reservation]:
        """The reservations of this owner for tunnels that are closed."""
        return self._kept.get(owner, {}).values()

    def kept_ports(self, owner: tuple[str, str]) -> Collection[int]:
        """The ports of these reservations, each once."""
        return self._kept_ports.get(owner, {}).keys()

    def hold(self, record: Reservation) -> None:
        """The tunnel of this holder is open at this address: the reservation does not expire."""
        former = self._records.get(record.holder)
        metered = record.metered if former is None else max(record.metered, former.metered)
        record = replace(record, expires=None, metered=metered)
        self._put(record)
        if record != former:
            self.changed(record.holder)

    def meter(self, holder: ReservationKey, metered: int) -> None:
        """The tunnels of this holder have relayed so many bytes that count. The number does not fall until the
        reservation is dropped.
        """
        record = self._records.get(holder)
        if record is not None and metered > record.metered:
            self._put(replace(record, metered=metered))
            self.changed(holder)

    def keep_until(
        self, holder: ReservationKey, expires: float, *, max_kept: int, max_per_owner: int
    ) -> list[Reservation]:
        """The tunnel has closed: keep its address until `expires`. Returns the reservations that were dropped for it:
        first the oldest of an owner that has more than `max_per_owner` closed tunnels, then the oldest of the owner
        that has the most.
        """
        record = self._records.get(holder)
        if record is None:
            return []
        self._put(replace(record, expires=expires))
        self.changed(holder)
        return list(self._make_space(holder, max_kept, max_per_owner))

    def drop(self, holder: ReservationKey) -> Reservation | None:
        """Drop a reservation and return it, if there is one."""
        record = self._take(holder)
        if record is not None:
            self.changed(holder)
        return record

    def expire(self, now: float) -> None:
        """Drop the reservations that have expired."""
        while self._expiring and self._expiring[0][0] <= now:
            _, _, record = heappop(self._expiring)
            if self._records.get(record.holder) is record:
                self.drop(record.holder)

    def retain(self, credentials: Iterable[str]) -> list[Reservation]:
        """Drop and return the reservations of all other credentials; without `credentials`, of every one."""
        known = frozenset(credentials) or {""}
        dropped = [record for record in self if record.holder.credential not in known]
        for record in dropped:
            self.drop(record.holder)
        return dropped

    def _make_space(self, newest: ReservationKey, max_kept: int, max_per_owner: int) -> Iterator[Reservation]:
        while (mine := len(self._kept.get(newest.owner, ()))) > max_per_owner or self._kept_count > max_kept:
            owner = newest.owner if mine > max_per_owner else max(self._kept, key=lambda one: len(self._kept[one]))
            oldest = next(iter(self._kept[owner].values()))
            self.drop(oldest.holder)
            yield oldest

    def _put(self, record: Reservation) -> None:
        """Store a record at the end, which keeps closed tunnels in the order of their closing."""
        self._take(record.holder)
        self._records[record.holder] = record
        for address in record.held:
            self._by_address.setdefault(address, {})[record.holder] = record
        for host in record.hosts:
            self._by_host.setdefault(host, {})[record.holder] = record
        if record.expires is not None:
            self._kept.setdefault(record.holder.owner, {})[record.holder] = record
            self._kept_ports.setdefault(record.holder.owner, Counter()).update(record.ports)
            self._kept_count += 1
            heappush(self._expiring, (record.expires, next(self._serial), record))

    def _take(self, holder: ReservationKey) -> Reservation | None:
        record = self._records.pop(holder, None)
        if record is None:
            return None
        for address in record.held:
            _discard(self._by_address, address, holder)
        for host in record.hosts:
            _discard(self._by_host, host, holder)
        if record.expires is not None:
            _discard(self._kept, holder.owner, holder)
            self._release_ports(record)
            self._kept_count -= 1
            if len(self._expiring) > 2 * self._kept_count + SPARE_EXPIRIES:
                self._expiring = [entry for entry in self._expiring if self._records.get(entry[2].holder) is entry[2]]
                heapify(self._expiring)
        return record

    def _release_ports(self, record: Reservation) -> None:
        counts = self._kept_ports[record.holder.owner]
        for port in record.ports:
            counts[port] -= 1
            if not counts[port]:
                del counts[port]
        if not counts:
            del self._kept_ports[record.holder.owner]


_Key = TypeVar("_Key")


def _discard(index: dict[_Key, dict[ReservationKey, Reservation]], key: _Key, holder: ReservationKey) -> None:
    """Remove a record from an index, and the entry with its last record."""
    records = index.get(key, {})
    records.pop(holder, None)
    if not records:
        index.pop(key, None)
