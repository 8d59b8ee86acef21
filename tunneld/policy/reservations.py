"""Addresses that stay with a tunnel while it is away: whose they are, and until when. Pure.

    hold ──► held ──leave──► away ──expires, or makes room──► gone
               ▲               │
               └───── hold ────┘    the same holder opens its tunnel again

A *holder* is a credential and the name that it gives a tunnel. Without credentials anybody may do everything, and the
address that asks stands for a credential: it keeps honest people apart, and who is not honest could close the tunnel of
another as well. A record says nothing of how a backend works: it has the port of the client side and the whole server
URI, key included, and a backend takes from that what it has use for.

Times are those of one clock that never goes back; the store, which outlives it, translates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

from tunneld.net.endpoint import Endpoint


@dataclass(frozen=True, slots=True)
class ReservationKey:
    """Whose an address is."""

    credential: str  # empty where there are none
    name: str  # of the tunnel
    host: str = ""  # the address that asked, where nothing better tells people apart

    @property
    def owner(self) -> tuple[str, str]:
        """Who has at most `max_reservations_per_owner` of them."""
        return self.credential, self.host


@dataclass(frozen=True, slots=True)
class Reservation:
    """One address. `expires` is None while its tunnel is open."""

    holder: ReservationKey
    backend: str
    client_port: int
    server: Endpoint = field(repr=False)  # with its key, a secret
    expires: float | None = None

    @property
    def ports(self) -> tuple[int, int]:
        """Those that nobody else gets: of the client side, and of the server URI, which may be a shared one."""
        return self.client_port, self.server.port


class ReservationTable:
    """All reservations. `port in book` asks whether somebody has it."""

    def __init__(self, changed: Callable[[ReservationKey], None] = lambda _holder: None) -> None:
        """`changed` is told of each holder whose record is another one now, or gone."""
        self.changed = changed
        self._records: dict[ReservationKey, Reservation] = {}  # those that are away in the order in which they left
        self._ports = Counter[int]()

    def __contains__(self, port: object) -> bool:
        return port in self._ports

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[Reservation]:
        return iter(self._records.values())

    def find(self, holder: ReservationKey) -> Reservation | None:
        """What this holder has."""
        return self._records.get(holder)

    def load(self, records: Iterable[Reservation]) -> None:
        """Begin with these, without telling anybody. Of two that have the same client port the later one is lost."""
        for record in records:
            if self.of_client_port(record.client_port) is None:
                self._put(record)

    def of_client_port(self, port: int) -> Reservation | None:
        """Who has this port on its client side."""
        if port not in self._ports:
            return None
        return next((record for record in self if record.client_port == port), None)

    def hold(self, record: Reservation) -> None:
        """The tunnel of this holder is open, at this address."""
        former = self._records.get(record.holder)
        record = replace(record, expires=None)
        self._put(record)
        if record != former:
            self.changed(record.holder)

    def leave(self, holder: ReservationKey, expires: float, *, most: int, most_per_owner: int) -> list[Reservation]:
        """The tunnel closed; its address stays until `expires`. Returns the reservations that had to make room: the
        oldest of an owner that has more than `most_per_owner` away, then the oldest of whoever has most.
        """
        record = self._records.get(holder)
        if record is None:
            return []
        self._put(replace(record, expires=expires))
        self.changed(holder)
        return list(self._make_room(holder, most, most_per_owner))

    def drop(self, holder: ReservationKey) -> Reservation | None:
        """Give an address up; returns what there was."""
        record = self._take(holder)
        if record is not None:
            self.changed(holder)
        return record

    def expire(self, now: float) -> None:
        """Forget those whose time is over."""
        for record in [record for record in self if record.expires is not None and record.expires <= now]:
            self.drop(record.holder)

    def retain(self, credentials: Iterable[str]) -> list[Reservation]:
        """Give up those of credentials that are not among these; where there are none, of whoever had one."""
        known = frozenset(credentials) or {""}
        dropped = [record for record in self if record.holder.credential not in known]
        for record in dropped:
            self.drop(record.holder)
        return dropped

    # Inside

    def _make_room(self, newcomer: ReservationKey, most: int, most_per_owner: int) -> Iterator[Reservation]:
        away = [record for record in self if record.expires is not None]  # oldest first
        counts = Counter(record.holder.owner for record in away)
        while counts[newcomer.owner] > most_per_owner or counts.total() > most:
            owner = newcomer.owner if counts[newcomer.owner] > most_per_owner else counts.most_common(1)[0][0]
            oldest = next(record for record in away if record.holder.owner == owner)
            away.remove(oldest)
            counts[owner] -= 1
            self.drop(oldest.holder)
            yield oldest

    def _put(self, record: Reservation) -> None:
        """At the end: what left last is there."""
        self._take(record.holder)
        self._records[record.holder] = record
        self._ports.update(set(record.ports))

    def _take(self, holder: ReservationKey) -> Reservation | None:
        record = self._records.pop(holder, None)
        for port in set(record.ports) if record is not None else ():
            self._ports[port] -= 1
            if not self._ports[port]:
                del self._ports[port]
        return record
