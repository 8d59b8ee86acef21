"""Penalties for sources that failed to authenticate. Pure: the time is an argument, in seconds of one monotonic clock.

A source is an IPv4 address or the /64 of an IPv6 address. Many devices can share it, so a failure counts against what
the peer claimed to be (a credential's name, or a key), at this source:

    failures of a claim    1    2    3    4    5   ...
    refused                -    -    p   2p   4p   ...  max_penalty             counted from the last failure

and against the source as a whole once per claim: one device with a wrong secret blocks itself and no neighbour, while a
peer that tries one name after the other blocks its address. A claim that has logged in from there lately does not count
against the source at all: when a secret is replaced, all agents of an office fail at once. Failures without a claim,
such as garbage, always count against the source. Both follow the table above, and both are forgiven completely when
`max_penalty` seconds have passed since the last refusal ended (or since the last failure, if that brought no refusal).
With the defaults and perfect timing, a claim gets 34 guesses an hour.

**Abandoned handshakes** cost the relay milliseconds and are cheap for the peer, like the class `noauth` of OpenSSH 9.8.
A source may leave `abandoned_handshakes` of them; each one beyond counts as a failure of the source, and so does each
repeated failure of a claim that comes as fast.

Memory holds `MAX_PENALTY_SOURCES` sources and as many claims. When a table is full, the entry with the fewest failures
is forgotten, and among equals the one with the oldest last failure. To be forgotten, a source needs that many other
sources that have failed at least as often; an attacker that has them can guess from each of them anyway, and gains
nothing by clearing one. No source pays for another: with one penalty shared by all unknown sources, a flood would lock
everyone out.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from tunneld.config.schema import ControlSettings
from tunneld.policy.rates import Buckets, Rate

FREE_FAILURES = 2
"""Failures without a penalty: room for a person's typing errors, and OpenSSH's 15 s of tolerance at 5 s each."""

MAX_COUNTED_FAILURES = FREE_FAILURES + 36
"""Failures after which a penalty does not grow: 1 ms doubled 35 times is more than a year, the longest penalty."""

MAX_PENALTY_SOURCES = 16_384
"""Sources remembered, at about 250 bytes each: 4 MiB. As many as `tunnels.max_sources` has for visitors."""

MAX_CLAIMS_PER_SOURCE = 8
"""Claims of one source with a count of their own. Failures of further ones count against the source, so that countless
names gain an attacker nothing, and no source fills the table.
"""


@dataclass(frozen=True, slots=True)
class Claim:
    """What a peer claimed to be, as a digest: names and keys may be long, and may be secrets in the wrong place."""

    kind: str  # "name" of a credential, or "key"
    digest: bytes


@dataclass(frozen=True, slots=True)
class Block:
    """A penalty in force: why a login is refused."""

    seconds: float
    of_name: bool  # of this name at this address, not of the whole address

    @property
    def reason(self) -> str:
        """The sentence for the peer."""
        left = f"blocked for {max(1, round(self.seconds))} s after failed logins"
        return f"this name is {left} with it from this address" if self.of_name else f"this address is {left} from it"


Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, slots=True)
class _Penalty:
    until: float  # refused until then
    forgiven_at: float


class Penalties(Generic[Key]):
    """The failures and the penalty of each key. `on_forgotten` is called with each key that is removed."""

    def __init__(
        self, max_entries: int = MAX_PENALTY_SOURCES, on_forgotten: Callable[[Key], None] = lambda _key: None
    ) -> None:
        self._max_entries = max_entries
        self._on_forgotten = on_forgotten
        # One row per number of failures, each in the order of the last failure: the first of a row is evicted first.
        self._rows: list[dict[Key, _Penalty]] = [{} for _ in range(MAX_COUNTED_FAILURES + 1)]
        self._failures: dict[Key, int] = {}  # by key: the index of its row

    def __len__(self) -> int:
        return len(self._failures)

    def __contains__(self, key: Key) -> bool:
        return key in self._failures

    def add(self, key: Key, now: float, penalty: float, max_penalty: float) -> int:
        """Record a failure at `now`; returns the number of failures of this key. `penalty` is the penalty of the first
        failure beyond `FREE_FAILURES`, `max_penalty` the longest one; all in seconds.
        """
        self.forgive(now)
        failures = min(self._take_out(key) + 1, MAX_COUNTED_FAILURES)
        if len(self) >= self._max_entries:
            row = next(row for row in self._rows if row)
            self.forget(next(iter(row)))
        length = min(penalty * 2.0 ** (failures - FREE_FAILURES - 1), max_penalty) if failures > FREE_FAILURES else 0.0
        self._rows[failures][key] = _Penalty(now + length, now + length + max_penalty)
        self._failures[key] = failures
        return failures

    def failures(self, key: Key) -> int:
        """The number of failures that count."""
        return self._failures.get(key, 0)

    def remaining(self, key: Key, now: float) -> float:
        """Seconds for which the key is still refused; 0.0 if it is not."""
        if (failures := self._failures.get(key)) is None:
            return 0.0
        return max(0.0, self._rows[failures][key].until - now)

    def active(self, now: float) -> list[Key]:
        """The keys that are refused now. It visits all: call it for a report, not per connection."""
        return [key for row in self._rows[FREE_FAILURES + 1 :] for key, penalty in row.items() if penalty.until > now]

    def forgive(self, now: float) -> None:
        """Remove the entries whose time is over."""
        for row in self._rows:
            while row and row[first := next(iter(row))].forgiven_at <= now:
                self.forget(first)

    def forget(self, key: Key) -> bool:
        """Remove an entry. Returns whether there was one."""
        had_failures = self._take_out(key) > 0
        if had_failures:
            self._on_forgotten(key)
        return had_failures

    def _take_out(self, key: Key) -> int:
        failures = self._failures.pop(key, 0)
        self._rows[failures].pop(key, None)
        return failures


@dataclass(frozen=True, slots=True)
class PenaltyReport:
    """A penalty in force, for the operator. Without a claim, it is that of the whole source."""

    source: int
    claim: Claim | None
    failures: int
    seconds: float  # that remain


class PenaltyTable:
    """The penalties of sources, and of what peers there claimed to be. `settings` is called at each failure."""

    def __init__(self, settings: Callable[[], ControlSettings], max_sources: int = MAX_PENALTY_SOURCES) -> None:
        self._settings = settings
        self._max_sources = max_sources
        self._of_source = Penalties[int](max_sources)
        self._of_claim = Penalties[tuple[int, Claim]](max_sources, self._on_claim_forgotten)
        self._claims: dict[int, set[Claim]] = {}  # by source: the ones in `_of_claim`
        self._abandoned_rate = ""
        self._abandoned: Buckets

    def fail(self, source: int, now: float, claim: Claim | None = None, *, is_known: bool = False) -> None:
        """Record that a peer failed to authenticate. `is_known` says that `claim` has logged in from there lately."""
        self._of_claim.forgive(now)
        settings = self._settings()
        if claim is None or not (is_known or self._has_space(source, claim)):
            self._of_source.add(source, now, settings.penalty, settings.max_penalty)
            return
        failures = self._of_claim.add((source, claim), now, settings.penalty, settings.max_penalty)
        self._claims.setdefault(source, set()).add(claim)
        if failures == 1 and not is_known:
            self._of_source.add(source, now, settings.penalty, settings.max_penalty)
        elif failures > 1:
            self.abandon(source, now)

    def abandon(self, source: int, now: float) -> None:
        """Record that a peer left after a handshake had begun, without an attempt to authenticate."""
        settings = self._settings()
        if settings.abandoned_handshakes != self._abandoned_rate:
            self._abandoned_rate = settings.abandoned_handshakes
            self._abandoned = Buckets(Rate.parse(self._abandoned_rate), self._max_sources)
        if not self._abandoned.take(source, now):
            self._of_source.add(source, now, settings.penalty, settings.max_penalty)

    def source_penalty(self, source: int, now: float) -> float:
        """Seconds for which the source is refused as a whole; 0.0 if it is not."""
        return self._of_source.remaining(source, now)

    def claim_penalty(self, source: int, claim: Claim, now: float) -> float:
        """Seconds for which this claim is refused at this source; 0.0 if it is not."""
        return self._of_claim.remaining((source, claim), now)

    def report(self, now: float) -> Iterator[PenaltyReport]:
        """All penalties in force. A wrong key is no penalty of its own: a key is right or wrong."""
        for source in self._of_source.active(now):
            yield PenaltyReport(source, None, self._of_source.failures(source), self.source_penalty(source, now))
        for source, claim in self._of_claim.active(now):
            if claim.kind == "name":
                failures = self._of_claim.failures((source, claim))
                yield PenaltyReport(source, claim, failures, self.claim_penalty(source, claim, now))

    def pardon(self, source: int) -> bool:
        """Forget all failures of a source and of its claims. Returns whether there were any."""
        claims = [self._of_claim.forget((source, claim)) for claim in list(self._claims.get(source, ()))]
        return self._of_source.forget(source) or any(claims)

    def _has_space(self, source: int, claim: Claim) -> bool:
        claims = self._claims.get(source, ())
        return claim in claims or len(claims) < MAX_CLAIMS_PER_SOURCE

    def _on_claim_forgotten(self, key: tuple[int, Claim]) -> None:
        source, claim = key
        claims = self._claims[source]
        claims.remove(claim)
        if not claims:
            del self._claims[source]
