"""Which ports a new tunnel may get, and in which order they are tried. Pure: time is an argument.

    free ──take──► taken ──give_back──► quarantined ──after `port_quarantine` seconds──► free

For a while the clients and agents of a closed tunnel still connect to its ports. In quarantine a port is therefore
given to its last owner only, or to any owner where no other port is left: then the one that was freed first.

An owner is a credential, or, on a relay without credentials, the address of the requester.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter, OrderedDict
from collections.abc import Callable, Container, Iterator

from tunneld.errors import LimitReachedError
from tunneld.net.address import Address, Port

Owner = tuple[str, str]
"""A credential and a host, of which one is empty; see `ReservationKey.owner`."""


class FreePorts:
    """A set of ports out of a range. To add, remove or draw one takes the same time however many there are."""

    def __init__(self, ports: range) -> None:
        """All of `ports`."""
        self.ports = ports
        self._count = len(ports)
        self._order = array("H", ports)  # the first `_count` are in the set
        self._places = array("H", range(len(ports)))  # in `_order`, by the offset in the range

    def __len__(self) -> int:
        return self._count

    def add(self, port: int) -> None:
        """Add a port. One outside the range is ignored."""
        if port in self.ports and self._places[port - self.ports.start] >= self._count:
            self._swap(port, self._count)
            self._count += 1

    def remove(self, port: int) -> None:
        """Remove a port, if it is in the set."""
        if port in self.ports and self._places[port - self.ports.start] < self._count:
            self._count -= 1
            self._swap(port, self._count)

    def drawn(self, draw: Callable[[int], int]) -> Iterator[int]:
        """Every port once, in the order of a lottery: `draw(count)` returns a number below `count`. The set must not
        change meanwhile.
        """
        for left in range(self._count, 0, -1):
            port = self._order[draw(left)]
            self._swap(port, left - 1)
            yield port

    def _swap(self, port: int, place: int) -> None:
        """Exchange a port with the one at `place`."""
        first = self.ports.start
        other, former = self._order[place], self._places[port - first]
        self._order[place], self._order[former] = port, other
        self._places[port - first], self._places[other - first] = place, former


class PortPool:
    """The ports of all tunnels of a relay, open or closed."""

    def __init__(self, quarantine: Callable[[], float], draw: Callable[[int], int]) -> None:
        """`quarantine` returns the seconds for which a freed port is kept from other owners, `draw(count)` a random
        number below `count`.
        """
        self._quarantine = quarantine
        self._draw = draw
        self._free = FreePorts(range(0))
        self._taken: dict[int, dict[Owner, int]] = {}  # how often: a draining tunnel can have the port of its successor
        self._by_owner = Counter[Owner]()  # how many of these ports, each counted once
        self._freed = OrderedDict[int, tuple[Owner, float]]()  # the last owner, and when: in quarantine, oldest first

    def take(self, port: int, owner: Owner) -> None:
        """A tunnel of `owner` has opened on this port."""
        owners = self._taken.setdefault(port, {})
        self._by_owner[owner] += owner not in owners
        owners[owner] = owners.get(owner, 0) + 1
        self._freed.pop(port, None)
        self._free.remove(port)

    def give_back(self, port: int, owner: Owner, now: float) -> None:
        """A tunnel on this port has closed."""
        owners = self._taken[port]
        owners[owner] -= 1
        if not owners[owner]:
            del owners[owner]
            self._by_owner[owner] -= 1
            if not self._by_owner[owner]:
                del self._by_owner[owner]
        if not owners:
            del self._taken[port]
            self.restore(port, owner, now)

    def restore(self, port: int, owner: Owner, freed_at: float) -> None:
        """A port was freed at this time, perhaps in another process. The newest is restored last."""
        if port not in self._taken:
            self._freed[port] = owner, freed_at
            self._free.remove(port)

    def quarantined(self, now: float) -> list[tuple[int, Owner, float]]:
        """The ports in quarantine, oldest first: each with its last owner and the seconds since it was freed."""
        self._expire(now)
        return [(port, owner, now - freed_at) for port, (owner, freed_at) in self._freed.items()]

    def count_of(self, owner: Owner) -> int:
        """How many ports the open tunnels of an owner have."""
        return self._by_owner[owner]

    def candidates(self, ports: range, now: float) -> Iterator[int]:
        """The ports of a range that no tunnel has, for a new one: those that are free in random order, then those in
        quarantine, in the order in which they were freed.

        At random, so that the newest tunnel cannot be found by counting ports.
        """
        self._expire(now)
        if self._free.ports != ports:
            self._free = FreePorts(ports)
            for port in (*self._taken, *self._freed):
                self._free.remove(port)
        yield from self._free.drawn(self._draw)
        yield from [port for port in self._freed if port in ports]

    def is_open_to(self, port: int, owner: Owner, now: float) -> bool:
        """Whether no other owner has this port, or had it during the quarantine."""
        self._expire(now)
        former, _ = self._freed.get(port, (owner, now))
        return former == owner and all(one == owner for one in self._taken.get(port, ()))

    def check(self, port: int, owner: Owner, now: float) -> None:
        """Raise `LimitReachedError` where another owner has or had a port that `owner` requests."""
        if self.is_open_to(port, owner, now):
            return
        if port in self._taken:
            raise LimitReachedError(
                f"no port is free in {port}: it belongs to a tunnel of another owner; request another port, or none"
            )
        seconds = math.ceil(self._freed[port][1] + self._quarantine() - now)
        raise LimitReachedError(
            f"public port {port} was freed by another owner a moment ago, and its clients may still connect: try again "
            f"in {seconds} s, or use another port (tunnels.port_quarantine)"
        )

    def _expire(self, now: float) -> None:
        """End quarantines that are over."""
        quarantine = self._quarantine()
        while self._freed:
            port, (_, freed_at) = next(iter(self._freed.items()))
            if freed_at + quarantine > now:
                return
            del self._freed[port]
            self._free.add(port)


class PortChoice:
    """The ports that a tunnel of one owner may get. Implements `net.sockets.PortOrder`."""

    def __init__(self, pool: PortPool, reserved: Container[Address], owner: Owner, clock: Callable[[], float]) -> None:
        """`reserved` are the addresses that are reserved for named tunnels."""
        self._pool = pool
        self._reserved = reserved
        self._owner = owner
        self._clock = clock

    def candidates(self, ports: range) -> Iterator[int]:
        """See `PortOrder.candidates`."""
        return (port for port in self._pool.candidates(ports, self._clock()) if Port(port) not in self._reserved)

    def accepts(self, port: int) -> bool:
        """See `PortOrder.accepts`."""
        return Port(port) not in self._reserved and self._pool.is_open_to(port, self._owner, self._clock())

    def why_none(self, ports: range) -> str:
        """See `PortOrder.why_none`."""
        count = sum(Port(port) in self._reserved for port in ports)
        return f"{count} are reserved for named tunnels (tunnels.reservation)" if count else ""
