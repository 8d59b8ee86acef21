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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

from tunneld.net.address import Address, Port
from tunneld.net.endpoint import Endpoint


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

    @property
    def held(self) -> frozenset[Address]:
        """What no other tunnel gets: the public addresses, and the port of the server URI, which may be shared."""
        return frozenset((*self.addresses, Port(self.server.port)))

    @property
    def client_port(self) -> int | None:
        """The first public port; None where visitors reach the tunnel by names alone."""
        return next((address.number for address in self.addresses if isinstance(address, Port)), None)

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
        self._held = Counter[Address]()

    def __contains__(self, address: object) -> bool:
        return address in self._held

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
        if address not in self._held:
            return None
        return next((record for record in self if address in record.addresses), None)

    def hold(self, record: Reservation) -> None:
        """The tunnel of this holder is open at this address: the reservation does not expire."""
        former = self._records.get(record.holder)
        record = replace(record, expires=None)
        self._put(record)
        if record != former:
            self.changed(record.holder)

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
        for record in [record for record in self if record.expires is not None and record.expires <= now]:
            self.drop(record.holder)

    def retain(self, credentials: Iterable[str]) -> list[Reservation]:
        """Drop and return the reservations of all other credentials; without `credentials`, of every one."""
        known = frozenset(credentials) or {""}
        dropped = [record for record in self if record.holder.credential not in known]
        for record in dropped:
            self.drop(record.holder)
        return dropped

    def _make_space(self, newest: ReservationKey, max_kept: int, max_per_owner: int) -> Iterator[Reservation]:
        kept = [record for record in self if record.expires is not None]  # oldest first
        counts = Counter(record.holder.owner for record in kept)
        while counts[newest.owner] > max_per_owner or counts.total() > max_kept:
            owner = newest.owner if counts[newest.owner] > max_per_owner else counts.most_common(1)[0][0]
            oldest = next(record for record in kept if record.holder.owner == owner)
            kept.remove(oldest)
            counts[owner] -= 1
            self.drop(oldest.holder)
            yield oldest

    def _put(self, record: Reservation) -> None:
        """Store a record at the end, which keeps closed tunnels in the order of their closing."""
        self._take(record.holder)
        self._records[record.holder] = record
        self._held.update(record.held)

    def _take(self, holder: ReservationKey) -> Reservation | None:
        record = self._records.pop(holder, None)
        for address in record.held if record is not None else ():
            self._held[address] -= 1
            if not self._held[address]:
                del self._held[address]
        return record
