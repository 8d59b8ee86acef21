"""The open tunnels of this process with their records, and the counters of those that have closed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from tunneld.directory.record import TunnelRecord
from tunneld.errors import UsageError
from tunneld.policy.access import EVERYBODY, Grant
from tunneld.policy.admission import RefusalKind
from tunneld.tunnel.snapshot import ServiceCounters
from tunneld.tunnel.tunnel import Tunnel


class LiveTunnels:
    """The tunnels of a process, open or opening."""

    def __init__(self) -> None:
        self.opened = 0  # tunnels since the first process
        self._last_id = 0
        self._tunnels: dict[str, Tunnel] = {}  # by id, oldest first
        self._records: dict[str, TunnelRecord] = {}  # by id
        self._owned: dict[str, dict[str, Tunnel]] = {}  # by credential and id, oldest first
        self._by_key: dict[str, Tunnel] = {}  # by the key of the server URI
        self._labelled: dict[str, dict[str, Tunnel]] = {}  # by label and id, oldest first
        self._past_octets = (0, 0)  # bytes of tunnels that have closed: up, down
        self._past_served = 0
        self._past_refusals = Counter[RefusalKind]()

    # Finding tunnels

    def __len__(self) -> int:
        return len(self._tunnels)

    def find(self, tunnel: str) -> Tunnel | None:
        """The tunnel with this id."""
        return self._tunnels.get(tunnel)

    def visible_to(self, grant: Grant = EVERYBODY) -> Sequence[Tunnel]:
        """The tunnels that this grant may see, oldest first: its own, or all for an admin."""
        return list((self._tunnels if grant.sees_all else self._owned.get(grant.name, {})).values())

    def is_visible_to(self, grant: Grant, tunnel: str) -> bool:
        """Whether this grant may see the tunnel with this id."""
        return grant.sees_all or tunnel in self._owned.get(grant.name, {})

    def owner_of(self, tunnel: str) -> str | None:
        """The credential of the tunnel with this id; empty without credentials."""
        record = self._records.get(tunnel)
        return record.owner if record is not None else None

    def name_of(self, tunnel: str) -> str | None:
        """The name of the tunnel with this id, where it has one."""
        record = self._records.get(tunnel)
        return (record.name or None) if record is not None else None

    def record_of(self, tunnel: str) -> TunnelRecord:
        """The record of the tunnel with this id."""
        return self._records[tunnel]

    def with_key(self, key: str) -> Tunnel | None:
        """The tunnel with this key in its server URI."""
        return self._by_key.get(key)

    def labelled(self, label: str, grant: Grant) -> Tunnel | None:
        """The newest tunnel with this label that this grant may see. Raises `UsageError` where several credentials that
        it may see have one.
        """
        tunnels = [one for one in self._labelled.get(label, {}).values() if self.is_visible_to(grant, one.id)]
        if len({self.record_of(one.id).owner for one in tunnels}) > 1:
            ids = ", ".join(one.id for one in tunnels)
            raise UsageError(f"several credentials have a tunnel called {label!r}: use an id, {ids}")
        return tunnels[-1] if tunnels else None

    def count_of(self, owner: str) -> int:
        """How many tunnels a credential has."""
        return len(self._owned.get(owner, {}))

    # Counters

    @property
    def octets(self) -> tuple[int, int]:
        """Bytes delivered since the start, by all tunnels: up, down."""
        up, down = self._past_octets
        for tunnel in self._tunnels.values():
            more_up, more_down = tunnel.octets
            up, down = up + more_up, down + more_down
        return up, down

    @property
    def served(self) -> int:
        """Visitors relayed since the start."""
        return self._past_served + sum(tunnel.served for tunnel in self._tunnels.values())

    @property
    def refusals(self) -> Counter[RefusalKind]:
        """Visitors refused since the start, by the class of the reason."""
        total = self._past_refusals.copy()
        for tunnel in self._tunnels.values():
            total.update(tunnel.refusals)
        return total

    @property
    def past(self) -> ServiceCounters:
        """The counters of tunnels that have closed, for the next process."""
        refusals = {kind.value: count for kind, count in self._past_refusals.items()}
        return ServiceCounters(self._last_id, self.opened, self._past_octets, self._past_served, refusals)

    def continue_from(self, past: ServiceCounters) -> None:
        """Continue the counters of another process."""
        self._last_id, self.opened = past.last_id, past.opened
        self._past_octets, self._past_served = past.octets, past.served
        self._past_refusals = Counter({RefusalKind(kind): count for kind, count in past.refusals.items()})

    # Opening and closing, called by the service

    @property
    def next_id(self) -> str:
        """The id for the next tunnel; `add` uses it up."""
        return f"t{self._last_id + 1}"

    def add(self, tunnel: Tunnel, record: TunnelRecord, *, adopted: bool = False) -> None:
        """Add a tunnel. One that is `adopted` from another process has been counted there."""
        if not adopted:
            self._last_id += 1
            self.opened += 1
        self._tunnels[tunnel.id] = tunnel
        self._records[tunnel.id] = record
        self._owned.setdefault(record.owner, {})[tunnel.id] = tunnel
        if record.server.key:
            self._by_key[record.server.key] = tunnel
        if record.name:
            self._labelled.setdefault(record.name, {})[tunnel.id] = tunnel

    def update(self, record: TunnelRecord) -> None:
        """The server URI of a tunnel has changed."""
        tunnel, former = self._tunnels[record.id], self._records[record.id].server.key
        self._records[record.id] = record
        if self._by_key.get(former) is tunnel:
            del self._by_key[former]
            self._by_key[record.server.key] = tunnel

    def remove(self, tunnel: Tunnel) -> TunnelRecord:
        """Remove a tunnel that has closed, and keep its counters. Returns its record."""
        del self._tunnels[tunnel.id]
        record = self._records.pop(tunnel.id)
        if self._by_key.get(record.server.key) is tunnel:
            del self._by_key[record.server.key]
        _remove_from(self._owned, record.owner, tunnel.id)
        if record.name:
            _remove_from(self._labelled, record.name, tunnel.id)
        (up, down), (more_up, more_down) = self._past_octets, tunnel.octets
        self._past_octets = up + more_up, down + more_down
        self._past_served += tunnel.served
        self._past_refusals += tunnel.refusals
        return record


def _remove_from(index: dict[str, dict[str, Tunnel]], key: str, tunnel: str) -> None:
    """Remove a tunnel from an index, and the key with its last tunnel."""
    del index[key][tunnel]
    if not index[key]:
        del index[key]
