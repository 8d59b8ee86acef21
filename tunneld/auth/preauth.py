"""Limits on unauthenticated connections. Pure: the time and the random number are arguments.

A connection is unauthenticated until its TLS handshake and authentication are done. Each costs a descriptor, a task and
memory, so their number is limited, as in OpenSSH's `MaxStartups`: the more there are, the likelier the next one is
refused at random. Random refusal means that an attacker that holds every place cannot shut honest peers out for
certain. A source, which is an IPv4 address or the /64 of an IPv6 address, also has a limit of its own, and penalties
once it has failed (penalties.py).

**Known sources.** Many devices can share an address. Where a peer has logged in within `known_address_time`, a penalty
of the address leaves `kept_places` for unauthenticated connections, and the credentials that were used there can still
log in. So a device that attacks the relay does not lock its neighbours out.

Loopback and `trusted_networks` count towards the total only; they have neither a limit per source nor a penalty. Every
client of a proxy on this machine has its address, so one bad client would shut out all the rest, and the operator too.
A local attacker has better ways to harm the machine, and guesses over HTTP share one core.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum

from tunneld.auth.penalties import MAX_PENALTY_SOURCES, Block, Claim, PenaltyReport, PenaltyTable
from tunneld.config.schema import ControlSettings
from tunneld.config.values import Startups
from tunneld.errors import UsageError
from tunneld.net.endpoint import is_loopback, parse_network
from tunneld.policy.bans import Bans
from tunneld.policy.networks import NetworkSet, read_address

MAX_KNOWN_CLAIMS = 64
"""Credentials remembered per known source: as many as one office or one NAT of a provider has behind an address."""


class PreauthReason(Enum):
    """Why an unauthenticated connection was refused: the label of the metric."""

    STARTUPS = "startups"
    "There are too many unauthenticated connections (`max_startups`); random below the upper limit."
    PER_SOURCE = "per_source"
    "Its source has `max_startups_per_source` unauthenticated connections."
    PENALTY = "penalty"
    "Its source failed to authenticate too often."
    BANNED = "banned"
    "An administrator has banned its network."


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
        return PreauthRefusal(PreauthReason.PENALTY, Block(counts.penalty, of_name=False).reason)
    if counts.of_source >= per_source:
        text = f"{counts.of_source} connections from your address have not authenticated yet"
        return PreauthRefusal(PreauthReason.PER_SOURCE, f"{text} (control.max_startups_per_source)")
    if random_number < startups.odds(counts.unauthenticated):
        text = f"{counts.unauthenticated} connections have not authenticated yet"
        return PreauthRefusal(PreauthReason.STARTUPS, f"{text} (control.max_startups); try again later")
    return None


class PreauthLimiter:
    """Counts the unauthenticated connections of one relay, over all services, and holds the penalties of sources.

    `settings` is called at each decision. `exempt` says which addresses have no limit per source and no penalty, in
    addition to `trusted_networks`. `bans` keep all connections of a network out, but not those of exempt ones.
    """

    def __init__(
        self,
        settings: Callable[[], ControlSettings],
        exempt: Callable[[str], bool] = is_loopback,
        bans: Bans | None = None,
    ) -> None:
        self.refusals: Counter[PreauthReason] = Counter()
        self._bans = bans if bans is not None else Bans()
        self._settings = settings
        self._exempt = exempt
        self._trusted_text: tuple[str, ...] = ()
        self._trusted = NetworkSet(())
        self._by_source: Counter[int] = Counter()  # without exempt sources; at most one entry per connection
        self._total = 0
        self._penalties = PenaltyTable(settings)
        self._known = KnownSources(lambda: settings().known_address_time)

    def __len__(self) -> int:
        return self._total

    @property
    def by_source(self) -> Counter[int]:
        """Unauthenticated connections of each source that has any, without exempt sources."""
        return self._by_source.copy()

    # Places

    def acquire(self, host: str, now: float, random_number: float) -> PreauthSlot | PreauthRefusal:
        """Take a place for a new connection from the address `host` at `now` (seconds). A refusal is counted. The
        caller releases the slot when the connection has authenticated, or closes it with the connection.
        """
        source = self._source(host)
        if (banned := self._refuse_banned(source, host, now)) is not None:
            return banned
        of_source = 0 if source is None else self._by_source[source]
        counts = PreauthCounts(self._total, of_source, self._penalty_of_connection(source, of_source, now))
        if (refusal := self._decide(counts, random_number)) is not None:
            return refusal
        self._count(source, 1)
        return PreauthSlot(
            lambda: self._count(source, -1), lambda at: self.fail(host, at), lambda at: self.abandon(host, at)
        )

    def refuse_penalised(self, host: str, now: float) -> PreauthRefusal | None:
        """The refusal of a connection from a source with a penalty, counted; else None. For connections that take no
        place.
        """
        source = self._source(host)
        if (banned := self._refuse_banned(source, host, now)) is not None:
            return banned
        return self._decide(PreauthCounts(0, 0, self._penalty_of_connection(source, 0, now)), 0.0)

    def is_exempt(self, host: str) -> bool:
        """Whether `host` has no limit per source and no penalty."""
        return self._source(host) is None

    # Failures and logins

    def fail(self, host: str, now: float, claim: Claim | None = None) -> None:
        """Record that a peer at `host` failed to authenticate, as `claim` if it named one."""
        if (source := self._source(host)) is not None:
            is_known = claim is not None and self._known.has_claim(source, claim, now)
            self._penalties.fail(source, now, claim, is_known=is_known)

    def abandon(self, host: str, now: float) -> None:
        """Record that a peer at `host` left after a handshake had begun, without an attempt to authenticate."""
        if (source := self._source(host)) is not None:
            self._penalties.abandon(source, now)

    def succeed(self, host: str, now: float, claim: Claim | None = None) -> None:
        """Record that a peer at `host` is authenticated, as `claim` if it named one."""
        if (source := self._source(host)) is not None:
            self._known.add(source, now, claim)

    def block(self, host: str, claim: Claim | None, now: float) -> Block | None:
        """Why a login as `claim` from `host` is refused now, whatever its proof; None if it is not."""
        if (source := self._source(host)) is None:
            return None
        if claim is not None and (seconds := self._penalties.claim_penalty(source, claim, now)) > 0:
            return Block(seconds, of_name=True)
        seconds = self._penalties.source_penalty(source, now)
        if seconds > 0 and not (claim is not None and self._known.has_claim(source, claim, now)):
            return Block(seconds, of_name=False)
        return None

    def penalty(self, host: str, now: float) -> float:
        """Seconds for which `host` is still refused as a whole; 0.0 if it is not."""
        source = self._source(host)
        return 0.0 if source is None else self._penalties.source_penalty(source, now)

    def penalised(self, now: float) -> int:
        """The number of sources that are refused now as a whole."""
        return sum(each.claim is None for each in self.report(now))

    def report(self, now: float) -> Iterator[PenaltyReport]:
        """All penalties in force."""
        return self._penalties.report(now)

    def pardon(self, host: str) -> bool:
        """Forget all failures from the source of `host`, an address or the /64 that `report` shows. Returns whether
        there were any. Raises `UsageError` if it is not an address.
        """
        try:
            source = read_address(host.removesuffix("/64")).source
        except ValueError:
            raise UsageError(f"{host!r} is not an address; penalties lists the ones that are blocked") from None
        return self._penalties.pardon(source)

    # Internals

    def _refuse_banned(self, source: int | None, host: str, now: float) -> PreauthRefusal | None:
        if source is None or not self._bans.covers(host, now):
            return None
        self.refusals[PreauthReason.BANNED] += 1
        return PreauthRefusal(PreauthReason.BANNED, "your address is banned by an administrator of the relay")

    def _penalty_of_connection(self, source: int | None, of_source: int, now: float) -> float:
        """Seconds for which a new connection is refused; 0.0 where it gets a place kept for a known source."""
        if source is None:
            return 0.0
        penalty = self._penalties.source_penalty(source, now)
        is_kept = penalty > 0 and of_source < self._settings().kept_places and self._known.has(source, now)
        return 0.0 if is_kept else penalty

    def _decide(self, counts: PreauthCounts, random_number: float) -> PreauthRefusal | None:
        settings = self._settings()
        refusal = decide(counts, settings.startups, settings.max_startups_per_source, random_number)
        if refusal is not None:
            self.refusals[refusal.kind] += 1
        return refusal

    def _source(self, host: str) -> int | None:
        """The source of an address; None if it is exempt."""
        if self._exempt(host):
            return None
        trusted = self._settings().trusted_networks
        if trusted != self._trusted_text:
            self._trusted_text, self._trusted = trusted, NetworkSet(map(parse_network, trusted))
        address = read_address(host)
        return None if address in self._trusted else address.source

    def _count(self, source: int | None, step: int) -> None:
        self._total += step
        if source is not None:
            self._by_source[source] += step
            if not self._by_source[source]:
                del self._by_source[source]


class PreauthSlot:
    """The place of one unauthenticated connection. `release` and `close` are idempotent; after them, nothing has an
    effect.
    """

    def __init__(
        self,
        release: Callable[[], None],
        fail: Callable[[float], None],
        abandon: Callable[[float], None] = lambda _now: None,
    ) -> None:
        self.has_begun = False  # the peer has sent something that cost the relay work, such as a TLS handshake
        self._release, self._fail, self._abandon = release, fail, abandon
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
            self.has_begun = False  # it is not counted as abandoned, too
            self._fail(now)

    def release(self) -> None:
        """Give the place up: the connection has authenticated."""
        if self._is_held:
            self._is_held = False
            self._release()

    def close(self, now: float) -> None:
        """Give the place up: the connection is closed. If it has begun a handshake, it has abandoned that."""
        if self._is_held and self.has_begun:
            self._abandon(now)
        self.release()


@dataclass(slots=True)
class _KnownSource:
    seen_at: float  # a peer was authenticated
    claims: OrderedDict[Claim, float] = field(default_factory=OrderedDict)  # the same by claim, oldest first


class KnownSources:
    """The sources where a peer has logged in lately, and as what. Beyond `max_sources`, the oldest is forgotten.

    `time` returns the number of seconds for which a login counts.
    """

    def __init__(self, time: Callable[[], float], max_sources: int = MAX_PENALTY_SOURCES) -> None:
        self._time = time
        self._max_sources = max_sources
        self._sources: OrderedDict[int, _KnownSource] = OrderedDict()  # oldest login first

    def __len__(self) -> int:
        return len(self._sources)

    def add(self, source: int, now: float, claim: Claim | None) -> None:
        """A peer at `source` is authenticated."""
        known = self._sources.setdefault(source, _KnownSource(now))
        known.seen_at = now
        self._sources.move_to_end(source)
        if claim is not None:
            known.claims[claim] = now
            known.claims.move_to_end(claim)
        if len(known.claims) > MAX_KNOWN_CLAIMS:
            known.claims.popitem(last=False)
        if len(self._sources) > self._max_sources:
            self._sources.popitem(last=False)

    def has(self, source: int, now: float) -> bool:
        """Whether a peer has logged in there."""
        known = self._sources.get(source)
        return known is not None and now - known.seen_at < self._time()

    def has_claim(self, source: int, claim: Claim, now: float) -> bool:
        """Whether a peer has logged in there as `claim`."""
        known = self._sources.get(source)
        seen_at = None if known is None else known.claims.get(claim)
        return seen_at is not None and now - seen_at < self._time()
