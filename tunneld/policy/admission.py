"""Which visitors may come: networks, how many at once from one source, how often new ones. Pure: time is an argument.

A source is an IPv4 address, or the /64 of an IPv6 one: as much as one customer of a network has, so that hopping from
address to address inside it gains nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from tunneld.net.endpoint import Network
from tunneld.policy.networks import NetworkSet, read_address
from tunneld.policy.rates import Buckets, Rate


class RefusalKind(Enum):
    """Why a visitor was turned away: the classes in which they are counted."""

    ADDRESS = "address"
    "`allow_from` or `deny_from` keeps its address out."
    PER_SOURCE = "per_source"
    "Its source has `max_per_source` visitors here."
    RATE = "rate"
    "Its source brings visitors faster than `visitor_rate`."
    FULL = "full"
    "The tunnel has as many visitors as it may have, relayed or waiting."
    HEADER = "header"
    "A trusted proxy brought it without a right PROXY protocol header in time."
    UNSERVED = "unserved"
    "No server connection came for it, or it left while it waited."


@dataclass(frozen=True, slots=True)
class AdmissionRefusal:
    """A visitor turned away: the class of the reason, and the reason for people."""

    kind: RefusalKind
    reason: str


@dataclass(frozen=True, slots=True)
class Rules:
    """What one tunnel asks of its visitors. The defaults ask nothing."""

    allow: tuple[tuple[Network, ...], ...] = ()  # a visitor is in each of these that is not empty
    deny: tuple[Network, ...] = ()  # and in none of these
    max_per_source: int | None = None
    rate: Rate | None = None
    max_sources: int = 1

    @property
    def ask_nothing(self) -> bool:
        """Whether everybody may come, as often as they like."""
        return not (any(self.allow) or self.deny or self.max_per_source or self.rate)


class Admission:
    """The visitors of one tunnel at the door: who comes in is counted until it leaves."""

    def __init__(self, rules: Rules) -> None:
        self._allow = [NetworkSet(networks) for networks in rules.allow if networks]
        self._deny = NetworkSet(rules.deny)
        self._most = rules.max_per_source
        self._here: dict[int, int] = {}  # visitors by source: no more entries than the tunnel has visitors
        self._buckets = Buckets(rules.rate, rules.max_sources) if rules.rate else None
        self._denied = AdmissionRefusal(RefusalKind.ADDRESS, "its address is kept out (deny_from)")
        self._not_allowed = AdmissionRefusal(RefusalKind.ADDRESS, "its address is not among those let in (allow_from)")
        self._crowded = AdmissionRefusal(
            RefusalKind.PER_SOURCE, f"its source has {self._most} visitors here (max_per_source)"
        )
        self._too_fast = AdmissionRefusal(RefusalKind.RATE, f"its source brings more than {rules.rate} (visitor_rate)")

    @property
    def sources(self) -> int:
        """How many sources are remembered, for the sake of either limit."""
        return len(self._here) + (len(self._buckets) if self._buckets else 0)

    def admit(self, host: str, now: float) -> AdmissionRefusal | None:
        """Count in a visitor from the address `host` at `now` (seconds), or say why not. A refused one uses nothing up.

        Who was admitted must be told to `left` once.
        """
        address = read_address(host)
        if address in self._deny:
            return self._denied
        if not all(address in networks for networks in self._allow):
            return self._not_allowed
        source = address.source
        here = self._here.get(source, 0)
        if self._most is not None and here >= self._most:
            return self._crowded
        if self._buckets is not None and not self._buckets.take(source, now):
            return self._too_fast
        if self._most is not None:
            self._here[source] = here + 1
        return None

    def count_in(self, host: str) -> None:
        """Somebody who was admitted earlier, by another process, is still here."""
        if self._most is not None:
            source = read_address(host).source
            self._here[source] = self._here.get(source, 0) + 1

    def left(self, host: str) -> None:
        """An admitted visitor is gone."""
        if self._most is None:
            return
        source = read_address(host).source
        if self._here[source] == 1:
            del self._here[source]
        else:
            self._here[source] -= 1
