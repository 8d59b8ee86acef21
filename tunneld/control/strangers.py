"""Who may begin to prove who they are: caps on strangers, and penalties for those that failed. Pure: time and dice are
arguments.

A stranger is a connection that has not finished its TLS handshake and authentication. Each costs a descriptor, a task
and memory before anything is known of it, so there are few of them: the more there are, the likelier a newcomer is
refused, by dice, and nobody can keep honest ones out for certain by holding every place (OpenSSH's `MaxStartups`). A
source, which is an IPv4 address or the /64 of an IPv6 one, has a cap of its own, and a penalty once it has failed.

Loopback is a source like others for the first cap alone. Everything behind a proxy on this machine has its address: a
stranger out there could shut all the others out, and the operator too. Whoever is on this machine has better ways to
harm it, and guesses over HTTP share one core.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from tunneld.config.schema import ControlSettings
from tunneld.config.startups import Startups
from tunneld.control.penalties import Penalties
from tunneld.endpoint import is_loopback
from tunneld.rules.networks import read_address


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
