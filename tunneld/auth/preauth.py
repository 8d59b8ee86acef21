"""Who may begin to prove who they are: caps on strangers, and penalties for those that failed. Pure: time and dice are
arguments.

A stranger is a connection that has not finished its TLS handshake and authentication. Each costs a descriptor, a task
and memory before anything is known of it, so there are few of them: the more there are, the likelier a newcomer is
refused, by dice, and nobody can keep honest ones out for certain by holding every place (OpenSSH's `MaxStartups`). A
source, which is an IPv4 address or the /64 of an IPv6 one, has a cap of its own, and a penalty once it has failed.

Loopback is a source like others for the first cap alone. Everything behind a proxy on this machine has its address: a
stranger out there could shut all the others out, and the operator too. Whoever is on this machine has better ways to
harm it, and guesses over HTTP share one core.

Sources that failed to prove who they are, and how long each is refused. Pure: time is an argument.

    failures     1    2    3    4    5   ...
    refused      -    -    p   2p   4p   ...  max_penalty             from the last failure on

A source that has not failed for `max_penalty` since it was last refused, or since it failed, is forgiven all at once.
With the defaults, and the best of timing, that is 34 guesses an hour from one source.

Memory holds `max_sources` sources. Beyond that, the one with the fewest failures goes, of those the one whose last
failure is the oldest. To be forgotten, a source would need that many others that have failed at least as often: whoever
has those has as many fresh ones, of which each may guess anyway, and gains nothing by clearing one. Nor is anybody
refused for what others did, as with one penalty that all newcomers share: then a flood would lock everybody out.
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
    """Why a stranger was refused: the classes in which they are counted."""

    STARTUPS = "startups"
    "There are too many strangers (`max_startups`), or the dice say so."
    PER_SOURCE = "per_source"
    "Its source has `max_startups_per_source` strangers here."
    PENALTY = "penalty"
    "Its source failed too often."


@dataclass(frozen=True, slots=True)
class PreauthCounts:
    """What is decided on. `of_source` and `penalty` are 0 for who is exempt."""

    strangers: int
    of_source: int
    penalty: float  # seconds that are left of it


@dataclass(frozen=True, slots=True)
class PreauthRefusal:
    """A stranger refused: the class of the reason, and the reason for people."""

    kind: PreauthReason
    reason: str


def decide(facts: PreauthCounts, startups: Startups, per_source: int, die: float) -> PreauthRefusal | None:
    """Refuse a newcomer, or not; `die` is at least 0.0 and below 1.0.

    The penalty comes first, so that it is what a penalised source is told, and the dice last, so that they fall for
    those alone whom nothing else refuses.
    """
    if facts.penalty > 0:
        return PreauthRefusal(
            PreauthReason.PENALTY, f"too many failures from your address; try again in {facts.penalty:.0f} s"
        )
    if facts.of_source >= per_source:
        text = f"{facts.of_source} connections from your address have not authenticated yet"
        return PreauthRefusal(PreauthReason.PER_SOURCE, f"{text} (control.max_startups_per_source)")
    if die < startups.odds(facts.strangers):
        text = f"{facts.strangers} connections have not authenticated yet"
        return PreauthRefusal(PreauthReason.STARTUPS, f"{text} (control.max_startups); try again later")
    return None


class PreauthLimiter:
    """The strangers of one relay, and the sources that failed, on whichever face."""

    def __init__(self, settings: Callable[[], ControlSettings], exempt: Callable[[str], bool] = is_loopback) -> None:
        self.refusals: Counter[PreauthReason] = Counter()
        self._settings = settings
        self._exempt = exempt
        self._here: Counter[int] = Counter()  # by source, without the exempt: at most one entry a stranger
        self._all = 0
        self._penalties = Penalties()

    def __len__(self) -> int:
        return self._all

    def acquire(self, host: str, now: float, die: float) -> PreauthSlot | PreauthRefusal:
        """Count in a stranger from the address `host` at `now` (seconds), or count and say why not."""
        source = self._source(host)
        of_source = 0 if source is None else self._here[source]
        if (refusal := self._judge(PreauthCounts(self._all, of_source, self.penalty(host, now)), die)) is not None:
            return refusal
        self._count(source, 1)
        return PreauthSlot(lambda: self._count(source, -1), lambda at: self.fail(host, at))

    def refuse_penalised(self, host: str, now: float) -> PreauthRefusal | None:
        """Count and say why nobody at `host` is let in now, for a face that asks anew with each request."""
        return self._judge(PreauthCounts(0, 0, self.penalty(host, now)), 0.0)

    def is_exempt(self, host: str) -> bool:
        """Whether `host` is the source of nobody: has no cap of its own, and no penalty."""
        return self._exempt(host)

    def fail(self, host: str, now: float) -> None:
        """Somebody at `host` did not prove who they are."""
        source, settings = self._source(host), self._settings()
        if source is not None:
            self._penalties.add(source, now, settings.penalty, settings.max_penalty)

    def penalty(self, host: str, now: float) -> float:
        """For how many more seconds nobody at `host` is let in; 0.0 where there is no penalty."""
        source = self._source(host)
        return 0.0 if source is None else self._penalties.remaining(source, now)

    def penalised(self, now: float) -> int:
        """How many sources are refused now."""
        return self._penalties.active(now)

    def _judge(self, facts: PreauthCounts, die: float) -> PreauthRefusal | None:
        settings = self._settings()
        refusal = decide(facts, settings.startups, settings.max_startups_per_source, die)
        if refusal is not None:
            self.refusals[refusal.kind] += 1
        return refusal

    def _source(self, host: str) -> int | None:
        return None if self._exempt(host) else read_address(host).source

    def _count(self, source: int | None, step: int) -> None:
        self._all += step
        if source is not None:
            self._here[source] += step
            if not self._here[source]:
                del self._here[source]


class PreauthSlot:
    """One connection of which nothing is known yet. Once it is known, or gone, nothing here does anything."""

    def __init__(self, leave: Callable[[], None], fail: Callable[[float], None]) -> None:
        self._leave, self._fail = leave, fail
        self._is_here = True

    @classmethod
    def mark_authenticated(cls) -> PreauthSlot:
        """Somebody where nobody is asked who they are."""
        somebody = cls(lambda: None, lambda _now: None)
        somebody.release()
        return somebody

    def fail(self, now: float) -> None:
        """It did not prove who it is, at `now` (seconds)."""
        if self._is_here:
            self._fail(now)

    def release(self) -> None:
        """It is known now, or gone."""
        if self._is_here:
            self._is_here = False
            self._leave()


FREE_FAILURES = 2
"""Failures without a penalty: a person's slips, and OpenSSH's 15 s of tolerance at 5 s each."""

MAX_FAILURES = FREE_FAILURES + 36
"""Failures after which a penalty does not grow: doubled 35 times, 1 ms is more than a year, the longest there is."""

MAX_SOURCES = 16_384
"""Sources remembered, at about 250 octets each: 4 MiB. As many as `tunnels.max_sources` has for visitors."""


@dataclass(frozen=True, slots=True)
class _Record:
    until: float  # refused until then
    forgiven_at: float


class Penalties:
    """What each source has coming. Times are seconds of one clock that does not go back."""

    def __init__(self, max_sources: int = MAX_SOURCES) -> None:
        self._max_sources = max_sources
        # By failures, and there in the order of the last one, so that who goes next is always the first of a row.
        self._rows: list[dict[int, _Record]] = [{} for _ in range(MAX_FAILURES + 1)]
        self._failures: dict[int, int] = {}  # in which row a source is

    def __len__(self) -> int:
        return len(self._failures)

    def add(self, source: int, now: float, penalty: float, max_penalty: float) -> None:
        """`source` failed at `now`; `penalty` is what the first failure beyond `FREE_FAILURES` costs, in seconds."""
        self._forgive(now)
        failures = min(self._drop(source) + 1, MAX_FAILURES)
        if len(self) >= self._max_sources:
            self._evict()
        length = min(penalty * 2.0 ** (failures - FREE_FAILURES - 1), max_penalty) if failures > FREE_FAILURES else 0.0
        self._rows[failures][source] = _Record(now + length, now + length + max_penalty)
        self._failures[source] = failures

    def remaining(self, source: int, now: float) -> float:
        """For how many more seconds the source is refused; 0.0 where it is not."""
        if (failures := self._failures.get(source)) is None:
            return 0.0
        return max(0.0, self._rows[failures][source].until - now)

    def active(self, now: float) -> int:
        """How many sources are refused now. Looks at all of them: for people, and not for each connection."""
        return sum(record.until > now for row in self._rows[FREE_FAILURES + 1 :] for record in row.values())

    def _forgive(self, now: float) -> None:
        for row in self._rows:
            while row and row[first := next(iter(row))].forgiven_at <= now:
                self._drop(first)

    def _evict(self) -> None:
        row = next(row for row in self._rows if row)
        self._drop(next(iter(row)))

    def _drop(self, source: int) -> int:
        """Forget a source; returns how often it had failed."""
        failures = self._failures.pop(source, 0)
        self._rows[failures].pop(source, None)
        return failures
