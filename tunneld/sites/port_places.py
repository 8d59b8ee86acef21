"""How many connections the shared ports have, in all and of each source; idle ones make room for new ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import islice
from typing import Protocol

from tunneld.policy.networks import read_address

IDLE_SEARCH = 32
"""Connections that are looked at to find an idle one: where none is idle, a crowd must not make each further connection
expensive. The ones that were looked at are the last to be looked at again.
"""


class PlaceSettings(Protocol):
    """What is read of `[names]`."""

    @property
    def max_connections(self) -> int: ...
    @property
    def max_connections_per_source(self) -> int: ...


class PlacedConnection(Protocol):
    """A connection of a visitor that sends requests."""

    @property
    def is_idle(self) -> bool:
        """Whether no request is under way."""

    def close_if_idle(self) -> None:
        """Close it unless a request is under way."""

    def drop(self, reason: str) -> None:
        """Close it now."""


class PortPlaces:
    """The places for connections on the shared ports."""

    def __init__(self, settings: Callable[[], PlaceSettings]) -> None:
        self.connections: dict[PlacedConnection, PortPlace] = {}  # with requests; the oldest first, see `IDLE_SEARCH`
        self._settings = settings
        self._taken = 0
        self._by_source: Counter[int] = Counter()

    def __len__(self) -> int:
        """Places that are taken."""
        return self._taken

    def enter(self, host: str, *, is_exempt: bool) -> PortPlace | None:
        """Take a place for a connection from the address `host`; None where there is none, and no idle connection that
        can be closed. Sources that are exempt have no limit of their own.
        """
        settings, source = self._settings(), read_address(host).source
        if self._taken >= settings.max_connections and not self._close_idle():
            return None
        is_full = not is_exempt and self._by_source[source] >= settings.max_connections_per_source
        if is_full and not self._close_idle(source):
            return None
        self._taken += 1
        self._by_source[source] += 1
        return PortPlace(self, source)

    def remove(self, source: int) -> None:
        """Give a place back: see `PortPlace.leave`."""
        self._taken -= 1
        self._by_source[source] -= 1
        if not self._by_source[source]:
            del self._by_source[source]

    def _close_idle(self, source: int | None = None) -> bool:
        """Close a connection that is without a request, of this source if one is given. Returns whether there was one
        among the ones that were looked at.
        """
        for connection, place in list(islice(self.connections.items(), IDLE_SEARCH)):
            if connection.is_idle and source in {None, place.source}:
                connection.close_if_idle()
                return True
            del self.connections[connection]
            self.connections[connection] = place
        return False


class PortPlace:
    """The place of one connection."""

    def __init__(self, places: PortPlaces, source: int) -> None:
        self.source = source
        self._places = places
        self._is_taken = True

    def leave(self) -> None:
        """The connection is closed, or passed on. Idempotent."""
        if self._is_taken:
            self._is_taken = False
            self._places.remove(self.source)
