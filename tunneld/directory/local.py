"""The directory of a relay that is one process: records in memory, reservations in SQLite.

No method waits, except `saved` and `release`, so what one finds still holds when the caller acts on it. Each look-up
takes the same time however many tunnels there are.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Generic, TypeVar

import trio

from tunneld.config.schema import Settings
from tunneld.directory.record import AddressClaim, TunnelRecord
from tunneld.directory.reservations import Reservations
from tunneld.errors import LimitReachedError, TunneldError, UsageError
from tunneld.net.address import Address, HostName, Port, Private, parse_host_name, parse_private
from tunneld.net.endpoint import Endpoint
from tunneld.policy.access import Grant
from tunneld.policy.ports import Owner, PortChoice, PortPool
from tunneld.policy.reservations import Reservation, ReservationKey

MAX_ENDED = 1024
"""Tunnels that have ended for good, by request or by a limit, whose reason is remembered, at about 300 bytes each. An
agent asks within seconds, or once it is reconnected. For a forgotten tunnel it is told that there is none, and opens
another.
"""
MAX_PORT_DIGITS = 5

K = TypeVar("K")


class TunnelIndex(Generic[K]):
    """The ids of the tunnels with each key, oldest first."""

    def __init__(self) -> None:
        self._ids: dict[K, list[str]] = {}

    def add(self, key: K, tunnel: str) -> None:
        """Add a tunnel, the newest with this key."""
        self._ids.setdefault(key, []).append(tunnel)

    def remove(self, key: K, tunnel: str) -> None:
        """Remove a tunnel."""
        ids = self._ids[key]
        ids.remove(tunnel)
        if not ids:
            del self._ids[key]

    def all(self, key: K) -> Sequence[str]:
        """The tunnels with this key, oldest first."""
        return self._ids.get(key, ())

    def newest(self, key: K) -> str:
        """The newest tunnel with this key; empty if there is none."""
        ids = self._ids.get(key)
        return ids[-1] if ids else ""


class LocalDirectory:
    """Implements `Directory`."""

    node = "local"

    def __init__(self, settings: Callable[[], Settings], state: Path | None) -> None:
        """`state` is the directory of the file of reservations; None: they are kept in memory only."""
        self._settings = settings
        self.reservations = Reservations(settings, state)
        self.pool = PortPool(lambda: settings().tunnels.port_quarantine, random.randrange)
        self._records: dict[str, TunnelRecord] = {}  # by id, oldest first
        self._owned: dict[str, dict[str, None]] = {}  # ids by credential, oldest first
        self._named = TunnelIndex[ReservationKey]()
        self._by_address = TunnelIndex[Address]()
        self._by_host = TunnelIndex[str]()  # the same name once for each path of a tunnel
        self._by_owner = TunnelIndex[Owner]()  # a tunnel once for each of its host names
        self._by_uri = TunnelIndex[Endpoint | str]()  # client URI; server URI, or its key where it has one
        self._ended: dict[Endpoint, tuple[str, TunneldError]] = {}  # by server URI: credential, and why it has ended

    # Look-ups

    async def find(self, reference: str) -> TunnelRecord | None:
        """See `Directory.find`. A server URI with a key is compared by the key alone: a reload may have moved the
        shared port since the tunnel was opened.
        """
        if "://" in reference:
            endpoint = Endpoint.parse(reference.strip())
            return self._records.get(self._by_uri.newest(endpoint.key or endpoint))
        record = self._records.get(reference.lower())
        if record is None and reference.isascii() and reference.isdigit() and len(reference) <= MAX_PORT_DIGITS:
            return self._records.get(self._by_address.newest(Port(int(reference))))
        if record is None and "@" in reference:
            with suppress(UsageError):
                return self._records.get(self._by_address.newest(parse_private(reference)))
        if record is None and "." in reference:
            with suppress(UsageError):
                return self._records.get(self._by_address.newest(parse_host_name(reference)))
        return record

    async def held_by(self, holder: ReservationKey | None) -> Sequence[TunnelRecord]:
        """See `Directory.held_by`."""
        return [self._records[tunnel] for tunnel in self._named.all(holder)] if holder is not None else ()

    async def list(self, owner: str | None = None) -> Sequence[TunnelRecord]:
        """See `Directory.list`."""
        return [self._records[tunnel] for tunnel in (self._records if owner is None else self._owned.get(owner, ()))]

    async def claim(
        self, holder: ReservationKey | None, owner: Owner, ports: Sequence[int], grant: Grant
    ) -> AddressClaim:
        """See `Directory.claim`."""
        records, reservation = await self.held_by(holder), self.reservations.of(holder)
        superseded = [self.reservations.superseded_by(holder, Port(port)) for port in ports]
        refusals = [
            self.reservations.why_refused(holder, Port(port), grant)
            or ("" if former is not None else self._why_taken(port, owner))
            for port, former in zip(ports, superseded, strict=True)
        ]
        refusal, former = next(filter(None, refusals), ""), next(filter(None, superseded), None)
        return AddressClaim(records, reservation, refusal, former)

    def _why_taken(self, port: int, owner: Owner) -> str:
        try:
            self.pool.check(port, owner, trio.current_time())
        except LimitReachedError as error:
            return str(error)
        return ""

    async def why_names_refused(
        self, holder: ReservationKey | None, names: Sequence[HostName], owner: Owner, grant: Grant
    ) -> str:
        """See `Directory.why_names_refused`."""
        if not names:
            return ""
        for name in names:
            if refusal := self.reservations.why_refused(holder, name, grant):
                return refusal
            if self._credentials_of(name.name) - {grant.name}:
                return (
                    f"could not open a tunnel: host name {name.name} belongs to another credential, with all its paths"
                )
        limit = self._settings().names.max_names_per_owner
        held = {name for name in self._names_held(owner) if name not in names}
        if len(held) + len(names) > limit:
            return (
                f"limit of host names reached: {len(held)} of {limit} are open or reserved (names.max_names_per_owner)"
            )
        return ""

    async def why_private_refused(self, holder: ReservationKey | None, address: Private, grant: Grant) -> str:
        """See `Directory.why_private_refused`. Open ones are found by `PrivateTunnels`, too, at the last moment."""
        record = self._records.get(self._by_address.newest(address))
        if record is not None and record.holder != holder:
            return f"could not open a tunnel: private tunnel {address} is open with another credential"
        return self.reservations.why_refused(holder, address, grant)

    def _credentials_of(self, host: str) -> set[str]:
        """The credentials of all tunnels, open or reserved, that have a host name or a path of it. Pages of one host
        share cookies, and a server of the path for challenges can get a certificate for the host.
        """
        open_ones = {self._records[tunnel].owner for tunnel in self._by_host.all(host)}
        return open_ones | {kept.holder.credential for kept in self.reservations.table.of_host(host)}

    def _names_held(self, owner: Owner) -> Iterator[HostName]:
        """The host names of an owner, of open tunnels and reserved."""
        mine = (self._records[tunnel].addresses for tunnel in self._by_owner.all(owner))
        for addresses in (*mine, *(kept.addresses for kept in self.reservations.table.kept_by(owner))):
            yield from (address for address in addresses if isinstance(address, HostName))

    def ports(self, owner: Owner) -> PortChoice:
        """See `Directory.ports`."""
        return PortChoice(self.pool, self.reservations.table, owner, trio.current_time)

    def ports_held(self, owner: Owner, ports: range) -> int:
        """See `Directory.ports_held`. The ports of tunnels from before a reload that changed the range count, too."""
        return self.pool.count_of(owner) + sum(map(ports.__contains__, self.reservations.table.kept_ports(owner)))

    # Changes

    async def open(self, record: TunnelRecord, claim: AddressClaim | None = None) -> None:
        """See `Directory.open`. Without a `claim`, the tunnel was open in another process."""
        owner = record.port_owner
        self._records[record.id] = record
        self._owned.setdefault(record.owner, {})[record.id] = None
        self._by_uri.add(record.client, record.id)
        self._by_uri.add(record.server.key or record.server, record.id)
        for address in record.addresses:
            self._by_address.add(address, record.id)
            if isinstance(address, HostName):
                self._by_host.add(address.name, record.id)
                self._by_owner.add(owner, record.id)
        for port in record.ports:
            self.pool.take(port, owner)
        self._ended.pop(record.server, None)  # a plain tcp tunnel may get the server URI of an ended one
        if (holder := record.holder) is not None:
            self._named.add(holder, record.id)
            self.reservations.hold(
                record.id, _reservation(record, holder), claim.superseded if claim is not None else None
            )

    async def remove(self, record: TunnelRecord, *, keep: bool | None) -> None:
        """See `Directory.remove`."""
        owner = record.port_owner
        del self._records[record.id]
        del self._owned[record.owner][record.id]
        if not self._owned[record.owner]:
            del self._owned[record.owner]
        self._by_uri.remove(record.client, record.id)
        self._by_uri.remove(record.server.key or record.server, record.id)
        for address in record.addresses:
            self._by_address.remove(address, record.id)
            if isinstance(address, HostName):
                self._by_host.remove(address.name, record.id)
                self._by_owner.remove(owner, record.id)
        for port in record.ports:
            self.pool.give_back(port, owner, trio.current_time())
        if (holder := record.holder) is not None:
            self._named.remove(holder, record.id)
            self.reservations.on_closed(record.id, holder, keep=keep, metered=record.metered)

    async def update(self, record: TunnelRecord) -> None:
        """See `Directory.update`. Nothing where it has closed meanwhile."""
        former = self._records.get(record.id)
        if former is None:
            return
        self._records[record.id] = record
        self._by_uri.remove(former.server.key or former.server, record.id)
        self._by_uri.add(record.server.key or record.server, record.id)
        if (holder := record.holder) is not None and self._named.newest(holder) == record.id:
            self.reservations.table.hold(_reservation(record, holder))

    async def meter(self, record: TunnelRecord, metered: int) -> None:
        """See `Directory.meter`."""
        if (holder := record.holder) is not None:
            self.reservations.table.meter(holder, metered)

    async def note_end(self, server: Endpoint, owner: str, error: TunneldError) -> None:
        """See `Directory.note_end`."""
        self._ended.setdefault(server, (owner, error))
        if len(self._ended) > MAX_ENDED:
            del self._ended[next(iter(self._ended))]

    async def why_ended(self, server: Endpoint) -> tuple[str, TunneldError | None]:
        """See `Directory.why_ended`."""
        return self._ended.get(server, ("", None))

    async def saved(self) -> None:
        """See `Directory.saved`."""
        await self.reservations.saved()


def _reservation(record: TunnelRecord, holder: ReservationKey) -> Reservation:
    return Reservation(holder, record.backend, record.addresses, record.server, metered=record.metered)
