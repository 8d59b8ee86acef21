"""What all tunnels of one owner share: an owner is a credential or, on a relay without credentials, an address.

    Tenants                 of one relay
    └─ Tenant ×owner        its visitors, its bandwidth, its share of the engine's time

The limits are those of the credential in force, so a reload applies to tunnels that are open. A credential without a
limit of its own, unless it is an admin, may have a part of what the process can hold (`control.credential_share`): one
tenant never keeps the visitors of another out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol
from weakref import WeakValueDictionary

import trio

from tunneld.config.schema import Settings
from tunneld.engine.budget import CostShare, TurnBudget
from tunneld.engine.throttle import TokenBucket
from tunneld.policy.access import Grant
from tunneld.policy.admission import AdmissionRefusal, RefusalKind
from tunneld.policy.bans import Bans
from tunneld.policy.places import share_of

DESCRIPTORS_PER_VISITOR = 3
"""Its own, that of its server connection, and one parked for the next visitor."""


NO_LIMIT = 1 << 30
"""More connections than a process can have."""


@dataclass(frozen=True, slots=True)
class TenantLimits:
    """What one owner may have. None: no limit."""

    visitors: int = NO_LIMIT  # connected or waiting, of all its tunnels
    server_connections: int | None = None  # that wait for visitors or carry them, of all its tunnels
    bandwidth: int | None = None  # bytes per second, of all its tunnels
    limited_by: str = ""  # the key that limits visitors

    @classmethod
    def of(cls, grant: Grant, pool: int, share: float) -> TenantLimits:
        """The limits of a credential where the process can serve `pool` visitors."""
        part = None if grant.is_admin else share_of(pool, share)
        if grant.max_total_visitors is not None:
            return cls(grant.max_total_visitors, part, grant.total_bandwidth, "max_total_visitors")
        return cls(NO_LIMIT if part is None else part, part, grant.total_bandwidth, "control.credential_share")


NO_LIMITS = TenantLimits()


class HasServerConnections(Protocol):
    """A server side."""

    @property
    def connections(self) -> int:
        """Connections of hidden servers that are parked, or that carry visitors together."""


class Tenant:
    """One owner of tunnels."""

    def __init__(self, limits: TenantLimits = NO_LIMITS, bans: Bans | None = None) -> None:
        """`limits` are those in force, `bans` those of the relay."""
        self.limits = limits
        self.bans = bans if bans is not None else Bans()
        self.visitors = 0  # connected or waiting
        self.server_sides: set[HasServerConnections] = set()  # of its open tunnels
        self._bucket: TokenBucket | None = None
        self._share: CostShare | None = None

    def share(self, budget: TurnBudget) -> CostShare:
        """Its share of the pump's turns, the same for all of its connections."""
        if self._share is None:
            self._share = CostShare(budget)
        return self._share

    @property
    def bucket(self) -> TokenBucket | None:
        """The bytes that all its tunnels may relay now; None: no limit. A tunnel asks when it opens."""
        rate = self.limits.bandwidth
        if rate is None:
            return None
        if self._bucket is None or self._bucket.rate != rate:
            self._bucket = TokenBucket(rate, None, trio.current_time())
        return self._bucket

    @property
    def server_connections_left(self) -> int:
        """How many more connections of hidden servers all its tunnels may have."""
        limit = self.limits.server_connections
        if limit is None:
            return NO_LIMIT
        return max(0, limit - sum(side.connections for side in self.server_sides))

    def refuse_visitor(self) -> AdmissionRefusal | None:
        """Why it may have no further visitor now; None: it may."""
        limits = self.limits
        if self.visitors < limits.visitors:
            return None
        reason = f"limit reached: its owner's tunnels have {self.visitors} visitors ({limits.limited_by})"
        return AdmissionRefusal(RefusalKind.FULL, reason)


class Tenants:
    """The owners of open tunnels."""

    def __init__(self, descriptors: int, bans: Bans | None = None) -> None:
        """`descriptors` is how many the process may open for tunnels. Nothing is limited before `apply`. `bans` keep
        visitors away from all of them.
        """
        self._bans = bans if bans is not None else Bans()
        self._pool = max(1, descriptors // DESCRIPTORS_PER_VISITOR)
        self._known: WeakValueDictionary[tuple[str, str], Tenant] = WeakValueDictionary()
        self._limits: dict[str, TenantLimits] = {}  # by credential

    def apply(self, settings: Settings) -> None:
        """These settings are in force from now on."""
        share = settings.control.credential_share
        self._limits = {one.name: TenantLimits.of(one.grant, self._pool, share) for one in settings.credential}
        for (credential, _), tenant in self._known.items():
            tenant.limits = self._limits.get(credential, NO_LIMITS)

    def of(self, credential: str, host: str) -> Tenant:
        """The tenant of a credential. On a relay without credentials the address `host` takes its place."""
        key = (credential, "" if credential else host)
        tenant = self._known.get(key)
        if tenant is None:
            self._known[key] = tenant = Tenant(self._limits.get(credential, NO_LIMITS), self._bans)
        return tenant
