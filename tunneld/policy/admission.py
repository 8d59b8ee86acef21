"""Which visitors a tunnel accepts: by network, by number per source, by rate per source. Pure: time is an argument.

A source is an IPv4 address, or the /64 of an IPv6 address. A network operator assigns a /64 to one customer, so moving
from address to address inside it gains nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from tunneld.net.endpoint import Network
from tunneld.policy.networks import Address, NetworkSet, read_address
from tunneld.policy.rates import Buckets, Rate


class RefusalKind(Enum):
    """Why a visitor was refused: the classes in which refusals are counted."""

    ADDRESS = "address"
    "`allow_from` or `deny_from` excludes its address."
    PER_SOURCE = "per_source"
    "Its source has `max_per_source` visitors, connected or waiting."
    RATE = "rate"
    "Its source exceeds `visitor_rate`."
    FULL = "full"
    "The tunnel has as many visitors as it may have, connected or waiting."
    HEADER = "header"
    "A trusted proxy sent no valid PROXY protocol header for it in time."
    DENIED = "denied"
    "The authorization service refused it, or gave no answer (`control.authorize`)."
    UNSERVED = "unserved"
    "No server connection arrived for it, or it disconnected while it waited."


@dataclass(frozen=True, slots=True)
class AdmissionRefusal:
    """A refused visitor: the class of the reason, and the reason as text."""

    kind: RefusalKind
    reason: str


@dataclass(frozen=True, slots=True)
class Rules:
    """What a visitor of one tunnel has to meet. The defaults accept every visitor."""

    allow: tuple[tuple[Network, ...], ...] = ()  # its address must be in each of these lists that is not empty
    deny: tuple[Network, ...] = ()  # and in none of these networks
    max_per_source: int | None = None
    rate: Rate | None = None
    max_sources: int = 1  # sources remembered for `rate`

    @property
    def accept_all(self) -> bool:
        """Whether every visitor is accepted, at any rate."""
        return not (any(self.allow) or self.deny or self.max_per_source or self.rate)


class NetworkRules:
    """From which networks visitors may come."""

    def __init__(self, rules: Rules) -> None:
        self._allow = [NetworkSet(networks) for networks in rules.allow if networks]
        self._deny = NetworkSet(rules.deny)
        self._denied = AdmissionRefusal(RefusalKind.ADDRESS, "address denied (deny_from)")
        self._not_allowed = AdmissionRefusal(RefusalKind.ADDRESS, "address not allowed (allow_from)")

    def refusal(self, address: Address) -> AdmissionRefusal | None:
        """Why a visitor from `address` is refused; None: it may come."""
        if address in self._deny:
            return self._denied
        if not all(address in networks for networks in self._allow):
            return self._not_allowed
        return None


class Admission:
    """Applies the rules of one tunnel. An accepted visitor counts until `left` is called for it."""

    def __init__(self, rules: Rules) -> None:
        self._networks = NetworkRules(rules)
        self._max_per_source = rules.max_per_source
        self._counts: dict[int, int] = {}  # visitors by source: no more entries than the tunnel has visitors
        self._buckets = Buckets(rules.rate, rules.max_sources) if rules.rate else None
        self._source_full = AdmissionRefusal(
            RefusalKind.PER_SOURCE, f"limit reached: {self._max_per_source} visitors from its address (max_per_source)"
        )
        self._too_fast = AdmissionRefusal(
            RefusalKind.RATE, f"limit reached: {rules.rate} new visitors from its address (visitor_rate)"
        )

    @property
    def sources(self) -> int:
        """How many sources are remembered, for either limit."""
        return len(self._counts) + (len(self._buckets) if self._buckets else 0)

    def admit(self, host: str, now: float) -> AdmissionRefusal | None:
        """Accept a visitor from the address `host` at `now` (seconds) and return None, or return why it is refused. A
        refused visitor uses up nothing.

        The caller calls `left` once for each accepted visitor.
        """
        address = read_address(host)
        if (refusal := self._networks.refusal(address)) is not None:
            return refusal
        source = address.source
        count = self._counts.get(source, 0)
        if self._max_per_source is not None and count >= self._max_per_source:
            return self._source_full
        if self._buckets is not None and not self._buckets.take(source, now):
            return self._too_fast
        if self._max_per_source is not None:
            self._counts[source] = count + 1
        return None

    def count_in(self, host: str) -> None:
        """Count a visitor that another process accepted and this one has taken over."""
        if self._max_per_source is not None:
            source = read_address(host).source
            self._counts[source] = self._counts.get(source, 0) + 1

    def left(self, host: str) -> None:
        """An accepted visitor has disconnected."""
        if self._max_per_source is None:
            return
        source = read_address(host).source
        if self._counts[source] == 1:
            del self._counts[source]
        else:
            self._counts[source] -= 1
