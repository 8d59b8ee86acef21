"""The places of one kind of connection (control, HTTP, ssh): who has how many, and how many are kept free. Pure.

    maximum ──┬── users               one credential has at most its share of all places
              └── reserved            admins, health probes, and connections that have not authenticated yet

The caller limits the connections of both kinds together to the maximum when it accepts one; a place is claimed when
the connection has authenticated. Admins have no share, and may use every place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from tunneld.errors import LimitReachedError
from tunneld.policy.access import Grant


def share_of(pool: int, fraction: float) -> int:
    """How many of `pool` one credential may have; at least one."""
    return max(1, int(pool * fraction))


def check_share(grant: Grant, what: str, wanted: int, pool: int, fraction: float) -> None:
    """Raise `LimitReachedError` where `wanted` is more than one credential may have of a pool. Admins may have all."""
    allowed = share_of(pool, fraction)
    if not grant.is_admin and wanted > allowed:
        raise LimitReachedError(
            f"{what} limit reached: {grant.title} may have {allowed} of {pool} (control.credential_share)"
        )


@dataclass(frozen=True, slots=True)
class PlaceLimits:
    """The limits in force."""

    maximum: int
    reserved: int  # of these for admins and probes
    share: float  # the part of all places that one credential may have


class Places:
    """The authenticated connections of one port."""

    def __init__(self, what: str, key: str, limits: Callable[[], PlaceLimits]) -> None:
        """`what` names a connection in messages, and `key` the setting with their maximum."""
        self._what, self._key = what, key
        self._limits = limits
        self._by_credential: Counter[str] = Counter()  # users only
        self._users = 0

    @property
    def users(self) -> int:
        """Connections of credentials that are no admins."""
        return self._users

    def claim(self, grant: Grant) -> Callable[[], None]:
        """Count a connection that has authenticated, and return what releases its place; call that once. Raises
        `LimitReachedError`.
        """
        if grant.is_admin:
            return _release_nothing
        limits, name = self._limits(), grant.name
        check_share(grant, self._what, self._by_credential[name] + 1, limits.maximum, limits.share)
        if self._users >= max(1, limits.maximum - limits.reserved):
            raise LimitReachedError(
                f"{self._what} limit reached: {self._users} are open, and the last {limits.reserved} of "
                f"{limits.maximum} are reserved for admins ({self._key}); try again later"
            )
        self._count(name, 1)
        return lambda: self._count(name, -1)

    def _count(self, name: str, step: int) -> None:
        self._users += step
        self._by_credential[name] += step
        if not self._by_credential[name]:
            del self._by_credential[name]


class Place:
    """The place of one connection, claimed when it has authenticated and released when it ends."""

    def __init__(self, places: Places | None = None) -> None:
        """Without `places` every claim succeeds."""
        self._places = places
        self._credential: str | None = None
        self._release: Callable[[], None] = _release_nothing

    def claim(self, grant: Grant) -> None:
        """Claim the place for this credential, instead of for the one that had it before. Raises
        `LimitReachedError`, and keeps what it has.
        """
        if self._places is not None and grant.name != self._credential:
            claimed = self._places.claim(grant)
            self._release()
            self._credential, self._release = grant.name, claimed

    def release(self) -> None:
        """The connection has ended. Idempotent."""
        self._release()
        self._credential, self._release = None, _release_nothing


def _release_nothing() -> None:
    """An admin's connection has no place of its own."""
