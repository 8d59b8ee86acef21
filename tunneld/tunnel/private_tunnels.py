"""The private tunnels of a relay, by their addresses."""

from __future__ import annotations

from collections.abc import Container
from typing import Protocol

from tunneld.errors import LimitReachedError
from tunneld.net.address import Address, Private
from tunneld.tunnel.visitor import Visitor


class PrivateDoor(Protocol):
    """Where the visitors of one private tunnel are taken: its ingress."""

    @property
    def address(self) -> Private:
        """The name, and the id of the node."""

    is_paused: bool
    """Whether it accepts no more visitors."""

    def take(self, visitor: Visitor) -> None:
        """Accept a visitor, which the callee owns, or refuse it."""


class PrivateTunnels:
    """The private tunnels of a relay, by their addresses."""

    def __init__(self) -> None:
        self._doors: dict[Private, PrivateDoor] = {}

    def find(self, address: Private) -> PrivateDoor | None:
        """The open tunnel with this address."""
        return self._doors.get(address)

    # Called by the ingresses

    def add(self, door: PrivateDoor, replaced: Container[Address]) -> PrivateDoor | None:
        """Take the address of a door. Returns the door that has it now, whose tunnel is to be `replaced`. Raises
        `LimitReachedError` where that is not one of those addresses.
        """
        former = self._doors.get(door.address)
        if former is not None and door.address not in replaced:
            raise LimitReachedError(
                f"private tunnel {door.address} is open already, with another credential: use another name, or an "
                "identity of its own for each credential"
            )
        self._doors[door.address] = door
        return former

    def remove(self, door: PrivateDoor, former: PrivateDoor | None) -> None:
        """Undo `add`. Does nothing where another door has the address now."""
        if self._doors.get(door.address) is not door:
            return
        if former is not None:
            self._doors[door.address] = former
        else:
            del self._doors[door.address]
