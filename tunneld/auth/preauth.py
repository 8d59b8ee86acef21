"""Limits on unauthenticated connections, and penalties for sources that failed to authenticate. Pure: the time and the
random number are arguments.

**Limits.** A connection is unauthenticated until its TLS handshake and authentication are done. Each costs a
descriptor, a task and memory, so their number is limited, as in OpenSSH's `MaxStartups`: the more there are, the
likelier the next one is refused at random. Random refusal means that an attacker that holds every place cannot shut
honest peers out for certain. A source, which is an IPv4 address or the /64 of an IPv6 address, also has a limit of its
own, and a penalty once it has failed.

Loopback counts towards the total only; it has neither a limit per source nor a penalty. Every client of a proxy on this
machine has its address, so one bad client would shut out all the rest, and the operator too. A local attacker has
better ways to harm the machine, and guesses over HTTP share one core.

**Penalties.** How long a source is refused after each failure:

    failures     1    2    3    4    5   ...
    refused      -    -    p   2p   4p   ...  max_penalty             counted from the last failure

A source is forgiven completely when `max_penalty` seconds have passed since its last refusal ended (or since its last
failure, if that brought no refusal). With the defaults and perfect timing, one source gets 34 guesses an hour.

Memory holds `max_sources` sources. When it is full, the source with the fewest failures is forgotten, and among equals
the one with the oldest last failure. To be forgotten, a source needs that many other sources that have failed at least
as often; an attacker that has them can guess from each of them anyway, and gains nothing by clearing one. No source
pays for another: with one penalty shared by all unknown sources, a flood would lock everyone out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from tunneld.config.schema import ControlSettings
from tunneld.config.values import Startups
from tunneld.net.endpoint import is_loopback
from tunneld.policy.networks import read_address


class PreauthReason(Enum):
    """Why an unauthenticated connection was refused: the label of the metric."""

    STARTUPS = "startups"
    "There are too many unauthenticated connections (`max_startups`); random below the upper limit."
    PER_SOURCE = "per_source"
    "Its source has `max_startups_per_source` unauthenticated connections."
    PENALTY = "penalty"
    "Its source failed to authenticate too often."


@dataclass(frozen=True, slots=True)
class PreauthCounts:
    """The facts of one decision. `of_source` and `penalty` are 0 for an exempt source."""

    unauthenticated: int  # connections of the whole relay
    of_source: int  # connections of this source
    penalty: float  # seconds that remain


@dataclass(frozen=True, slots=True)
class PreauthRefusal:
    """A refusal: its class for the metric, and the sentence for the peer and the log."""

    kind: PreauthReason
    reason: str


def decide(counts: PreauthCounts, startups: Startups, per_source: int, random_number: float) -> PreauthRefusal | None:
    """Refuse a new connection, or return None to accept it; `random_number` is at least 0.0 and below 1.0.

    The penalty is checked first, so that a penalised source is told about it. The random refusal comes last, so that it
    only hits connections that nothing else refuses.
    """
    if counts.penalty > 0:
        return PreauthRefusal(
            PreauthReason.PENALTY, f"too many failed logins from your address; try again in {counts.penalty:.0f} s"
        )
    if counts.of_source >= per_source:
        text = f"{counts.of_source} connections from your address have not authenticated yet"
        return PreauthRefusal(PreauthReason.PER_SOURCE, f"{text} (control.max_startups_per_source)")
    if random_number < startups.odds(counts.unauthenticated):
        text = f"{counts.unauthenticated} connections have not authenticated yet"
        return PreauthRefusal(PreauthReason.STARTUPS, f"{text} (control.max_startups); try again later")
    return None


class PreauthLimiter:
    """Counts the unauthenticated connections of one relay, over all services, and holds the penalties of sources.

    `settings` is called at each decision. `exempt` says which addresses have no limit per source and no penalty.
    """

    def __init__(self, settings: Callable[[], ControlSettings], exempt: Callable[[str], bool] = is_loopback) -> None:
        self.refusals: Counter[PreauthReason] = Counter()
        self._settings = settings
        self._exempt = exempt
        self._by_source: Counter[int] = Counter()  # without exempt sources; at most one entry per connection
        self._total = 0
        self._penalties = Penalties()

    def __len__(self) -> int:
        return self._total

    @property
    def by_source(self) -> Counter[int]:
        """Unauthenticated connections of each source that has any, without exempt sources."""
        return self._by_source.copy()

    def acquire(self, host: str, now: float, random_number: float) -> PreauthSlot | PreauthRefusal:
        """Take a place for a new connection from the address `host` at `now` (seconds). A refusal is counted. The
        caller releases the slot when the connection has authenticated or is closed.
        """
        source = self._source(host)
        of_source = 0 if source is None else self._by_source[source]
        counts = PreauthCounts(self._total, of_source, self.penalty(host, now))
        if (refusal := self._decide(counts, random_number)) is not None:
            return refusal
        self._count(source, 1)
        return PreauthSlot(lambda: self._count(source, -1), lambda at: self.fail(host, at))

    def refuse_penalised(self, host: str, now: float) -> PreauthRefusal | None:
        """The refusal of a connection from a source with a penalty, counted; else None. For connections that take no
        place.
        """
        return self._decide(PreauthCounts(0, 0, self.penalty(host, now)), 0.0)

    def is_exempt(self, host: str) -> bool:
        """Whether `host` has no limit per source and no penalty."""
        return self._exempt(host)

    def fail(self, host: str, now: float) -> None:
        """Record that a peer at `host` failed to authenticate."""
        source, settings = self._source(host), self._settings()
        if source is not None:
            self._penalties.add(source, now, settings.penalty, settings.max_penalty)

    def penalty(self, host: str, now: float) -> float:
        """Seconds for which connections from `host` are still refused; 0.0 if it has no penalty."""
        source = self._source(host)
        return 0.0 if source is None else self._penalties.remaining(source, now)

    def penalised(self, now: float) -> int:
        """The number of sources that are refused now."""
        return self._penalties.active(now)

    def _decide(self, counts: PreauthCounts, random_number: float) -> PreauthRefusal | None:
        settings = self._settings()
        refusal = decide(counts, settings.startups, settings.max_startups_per_source, random_number)
        if refusal is not None:
            self.refusals[refusal.kind] += 1
        return refusal

    def _source(self, host: str) -> int | None:
        return None if self._exempt(host) else read_address(host).source

    def _count(self, source: int | None, step: int) -> None:
        self._total += step
        if source is not None:
            self._by_source[source] += step
            if not self._by_source[source]:
                del self._by_source[source]


class PreauthSlot:
    """The place of one unauthenticated connection. `release` is idempotent; after it, `fail` has no effect."""

    def __init__(self, release: Callable[[], None], fail: Callable[[float], None]) -> None:
        self._release, self._fail = release, fail
        self._is_held = True

    @classmethod
    def exempt(cls) -> PreauthSlot:
        """A slot, already released, for a connection that needs no place because it is not asked to authenticate."""
        slot = cls(lambda: None, lambda _now: None)
        slot.release()
        return slot

    def fail(self, now: float) -> None:
        """Record that the connection failed to authenticate, at `now` (seconds)."""
        if self._is_held:
            self._fail(now)

    def release(self) -> None:
        """Give the place up: the connection has authenticated or is closed."""
        if self._is_held:
            self._is_held = False
            self._release()


FREE_FAILURES = 2
"""Failures without a penalty: room for a person's typing errors, and OpenSSH's 15 s of tolerance at 5 s each."""

MAX_COUNTED_FAILURES = FREE_FAILURES + 36
"""Failures after which a penalty does not grow: 1 ms doubled 35 times is more than a year, the longest penalty."""

MAX_PENALTY_SOURCES = 16_384
"""Sources remembered, at about 250 bytes each: 4 MiB. As many as `tunnels.max_sources` has for visitors."""


@dataclass(frozen=True, slots=True)
class _Penalty:
    until: float  # refused until then
    forgiven_at: float


class Penalties:
    """The failures and the penalty of each source. Times are seconds of one monotonic clock."""

    def __init__(self, max_sources: int = MAX_PENALTY_SOURCES) -> None:
        self._max_sources = max_sources
        # One row per number of failures, each in the order of the last failure: the first of a row is evicted first.
        self._rows: list[dict[int, _Penalty]] = [{} for _ in range(MAX_COUNTED_FAILURES + 1)]
        self._failures: dict[int, int] = {}  # by source: the index of its row

    def __len__(self) -> int:
        return len(self._failures)

    def add(self, source: int, now: float, penalty: float, max_penalty: float) -> None:
        """Record a failure of `source` at `now`. `penalty` is the penalty of the first failure beyond `FREE_FAILURES`,
        `max_penalty` the longest one; all in seconds.
        """
        self._forgive(now)
        failures = min(self._forget(source) + 1, MAX_COUNTED_FAILURES)
        if len(self) >= self._max_sources:
            self._evict()
        length = min(penalty * 2.0 ** (failures - FREE_FAILURES - 1), max_penalty) if failures > FREE_FAILURES else 0.0
        self._rows[failures][source] = _Penalty(now + length, now + length + max_penalty)
        self._failures[source] = failures

    def remaining(self, source: int, now: float) -> float:
        """Seconds for which the source is still refused; 0.0 if it is not."""
        if (failures := self._failures.get(source)) is None:
            return 0.0
        return max(0.0, self._rows[failures][source].until - now)

    def active(self, now: float) -> int:
        """The number of sources that are refused now. It visits all of them: call it for a report, not per
        connection.
        """
        return sum(penalty.until > now for row in self._rows[FREE_FAILURES + 1 :] for penalty in row.values())

    def _forgive(self, now: float) -> None:
        for row in self._rows:
            while row and row[first := next(iter(row))].forgiven_at <= now:
                self._forget(first)

    def _evict(self) -> None:
        row = next(row for row in self._rows if row)
        self._forget(next(iter(row)))

    def _forget(self, source: int) -> int:
        """Remove a source; returns its number of failures."""
        failures = self._failures.pop(source, 0)
        self._rows[failures].pop(source, None)
        return failures
