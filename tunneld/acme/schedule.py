"""When a certificate is due, when a failed order is tried again, and how many orders there may be. Pure.

All times are in seconds since 1970, given by the caller.
"""

from __future__ import annotations

import zlib
from typing import Protocol

from tunneld.policy.rates import Buckets, Rate

JITTER = 0.1
"""The part of the time left for renewals over which they are spread: certificates that were obtained together, as at
the first start, are not renewed together.
"""
MAX_OWNERS = 16_384
"""Owners with a count of their own, 150 bytes each: as many as a relay has sources of visitors."""
ROUNDING = 0.001
"Seconds: a time since 1970 is exact to a microsecond only, and an order a moment too early would be refused again."
STAGING = {
    "https://acme-v02.api.letsencrypt.org/directory": "https://acme-staging-v02.api.letsencrypt.org/directory",
}
"""Directories of trials: these do not count trials against the limits of real orders."""


class RenewalTimes(Protocol):
    """The settings for renewals; see `[acme]`."""

    @property
    def renew_left(self) -> float:
        """The part of its life that a certificate has left when it is renewed."""

    @property
    def renew_left_short(self) -> float:
        """The same for certificates that live shorter than `short_life`."""

    @property
    def short_life(self) -> float:
        """Seconds."""


def spread(name: str) -> float:
    """A fraction from 0 to 1 that is always the same for a name, so that a restart does not change its plans."""
    return zlib.crc32(name.encode()) / 2**32


def renewal_at(
    times: RenewalTimes, name: str, not_before: float, not_after: float, suggestion: float | None = None
) -> float:
    """When to renew a certificate of `name`: when the authority suggests it (RFC 9773), else when it has so much of its
    life left as the settings say. No suggestion is followed beyond the middle of that time: what fails then must still
    be repaired.
    """
    life = not_after - not_before
    left = life * (times.renew_left_short if life < times.short_life else times.renew_left)
    if suggestion is not None:
        return min(suggestion, not_after - left / 2)
    return not_after - left * (1 - JITTER * spread(name))


def retry_delay(failures: int, first: float, longest: float) -> float:
    """Seconds until an order is tried again after so many failures in a row: `first`, then each time twice as long."""
    return min(longest, first * 2.0 ** min(failures - 1, 32))


class OrderLimits:
    """How many orders there may be: of the relay, and of each owner. Renewals are not counted; there are only as many
    as certificates.
    """

    def __init__(self, relay: Rate, owner: Rate) -> None:
        self.rates = relay, owner
        self._relay = Buckets(relay, 1)
        self._owners = Buckets(owner, MAX_OWNERS)

    def take(self, owner: str, now: float) -> tuple[float, str]:
        """Count an order. Returns 0.0, or the seconds until one is possible and the name of the limit; then nothing is
        counted. `owner` is empty for certificates of the relay itself.
        """
        waits = [(self._relay.wait("", now), "max_orders")]
        if owner:
            waits.append((self._owners.wait(owner, now), "max_orders_per_owner"))
        longest, limit = max(waits)
        if longest > 0:
            return longest + ROUNDING, limit
        self._relay.take("", now)
        if owner:
            self._owners.take(owner, now)
        return 0.0, ""
