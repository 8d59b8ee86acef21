"""The private tunnels of a relay, by their addresses."""

from __future__ import annotations

import hashlib
from collections.abc import Container
from typing import Protocol

from tunneld.errors import LimitReachedError
from tunneld.net.address import Address, Private
from tunneld.tunnel.visitor import Visitor

MAX_TICKETS = 10_000
"""Of the relay, at some 300 bytes each."""
MAX_TICKETS_PER_TUNNEL = 100
"""A person hands out a few in the ten minutes that they last."""


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
    """The private tunnels of a relay, by their addresses, and the tickets of invited visitors; they have no credential.
    Tickets are forgotten when the relay restarts.
    """

    def __init__(self) -> None:
        self._doors: dict[Private, PrivateDoor] = {}
        self._tickets: dict[bytes, tuple[Private, float]] = {}  # by hash: with the time at which it expires

    def find(self, address: Private) -> PrivateDoor | None:
        """The open tunnel with this address."""
        return self._doors.get(address)

    def invite(self, address: Private, ticket: str, now: float, seconds: float) -> None:
        """Let visitors with this ticket ask for a tunnel. Times in seconds. Raises `LimitReachedError`."""
        if len(self._tickets) >= MAX_TICKETS:
            self._tickets = {key: each for key, each in self._tickets.items() if each[1] > now}
        mine = sum(each == address and expires > now for each, expires in self._tickets.values())
        if mine >= MAX_TICKETS_PER_TUNNEL or len(self._tickets) >= MAX_TICKETS:
            limit = MAX_TICKETS_PER_TUNNEL if mine >= MAX_TICKETS_PER_TUNNEL else MAX_TICKETS
            raise LimitReachedError(f"limit of invitations reached: {limit} have not expired yet; try later")
        self._tickets[_hash(ticket)] = address, now + seconds

    def invited(self, ticket: str, now: float) -> Private | None:
        """The tunnel for which a ticket is good. It is not used up: the agent sees to it that only one visitor enters,
        and an attempt that fails on the way can be repeated.
        """
        address, expires = self._tickets.get(_hash(ticket), (None, 0.0))
        return address if expires > now else None

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


def _hash(ticket: str) -> bytes:
    """Looking up a hash takes no time that depends on how much of a guess is right."""
    return hashlib.sha256(ticket.encode()).digest()
