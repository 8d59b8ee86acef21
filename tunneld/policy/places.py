"""The places of one kind of connection (control, HTTP, ssh): who has how many, and how many are kept free. Pure.

    maximum ──┬── users               one credential has at most its share of all places
              └── reserved            admins, and health probes of this machine

A connection that must authenticate claims its place when it has; until then it has one of `max_startups`
(auth/preauth.py) and takes none away here. Any other claims a place when it is accepted, as `EVERYBODY`. Admins have no
share, and may use every place.
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
        self._admins = 0

    @property
    def full(self) -> str | None:
        """Why every claim would be refused now; None if there is a place."""
        maximum, taken = self._limits().maximum, self._users + self._admins
        return f"{taken} of {maximum} {self._what}s are open ({self._key})" if taken >= maximum else None

    def claim(self, grant: Grant, held: Grant | None = None) -> None:
        """Count a connection for this credential, instead of for `held` if it is counted already. Raises
        `LimitReachedError`, and then nothing changes.
        """
        if held is not None:
            self._count(held, -1)
        try:
            self._check(grant)
        except LimitReachedError:
            if held is not None:
                self._count(held, 1)
            raise
        self._count(grant, 1)

    def release(self, held: Grant) -> None:
        """A connection that is counted for this credential has ended."""
        self._count(held, -1)

    def _check(self, grant: Grant) -> None:
        limits = self._limits()
        if (reason := self.full) is not None:
            raise LimitReachedError(f"{reason}; try again later")
        if grant.is_admin:
            return
        check_share(grant, self._what, self._by_credential[grant.name] + 1, limits.maximum, limits.share)
        if self._users >= max(1, limits.maximum - limits.reserved):
            raise LimitReachedError(
                f"{self._what} limit reached: {self._users} are open, and the last {limits.reserved} of "
                f"{limits.maximum} are reserved for admins ({self._key}); try again later"
            )

    def _count(self, grant: Grant, step: int) -> None:
        if grant.is_admin:
            self._admins += step
            return
        self._users += step
        self._by_credential[grant.name] += step
        if not self._by_credential[grant.name]:
            del self._by_credential[grant.name]


class Place:
    """The place of one connection, claimed when it needs no authentication or has it, and released when it ends."""

    def __init__(self, places: Places | None = None) -> None:
        """Without `places` every claim succeeds."""
        self._places = places
        self._held: Grant | None = None

    def claim(self, grant: Grant) -> None:
        """Claim the place for this credential, instead of for the one that had it before. Raises
        `LimitReachedError`, and keeps what it has.
        """
        held = self._held
        if self._places is None or (held is not None and (held.name, held.is_admin) == (grant.name, grant.is_admin)):
            return
        self._places.claim(grant, held)
        self._held = grant

    def release(self) -> None:
        """The connection has ended. Idempotent."""
        if self._places is not None and self._held is not None:
            self._places.release(self._held)
        self._held = None
