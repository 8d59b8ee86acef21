"""The proof that a user owns the domain of a host name: a TXT record that only its owner can set.

    shop.example.com   ──►   _tunneld.shop.example.com  TXT  "tunneld-domain=..."   see policy/names.py

It is looked up when a tunnel with the name opens. A record that was found is remembered for a while, so that an agent
that reconnects needs no look-up; one that is missing for a moment only, since its owner is about to set it.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from typing import Protocol

import trio

from tunneld.errors import reason_of
from tunneld.net.address import HostName
from tunneld.policy.names import proof_record, proof_text

MISSING_CACHE = 5.0
"""Seconds for which an answer without the record holds: one that tries again and again asks no DNS server for more."""
MAX_CACHED = 4096
"""Records that are remembered, at about 300 bytes each."""
MAX_LOOKUPS = 16
"""Look-ups at the same time, each with a socket; of one credential, one."""
MAX_TEXTS = 100
"""TXT records of one name that are read: a name with a proof has few."""

TxtLookup = Callable[[str, tuple[str, int] | None, float], Awaitable[Collection[str]]]
"""Looks up the TXT records of a name, at a DNS server or those of the system, for at most this many seconds. Raises
OSError where there is no answer.
"""


class ProofSettings(Protocol):
    """What is read of `[names]`."""

    @property
    def domain(self) -> str: ...
    @property
    def custom_domains(self) -> bool: ...
    @property
    def custom_domains_cache(self) -> float: ...
    @property
    def resolver_address(self) -> tuple[str, int] | None: ...
    @property
    def resolver_timeout(self) -> float: ...


@dataclass(frozen=True, slots=True)
class MissingProof:
    """Why a credential may not use a name now."""

    reason: str
    is_certain: bool  # False: there was no answer, which says nothing about the record


class DomainProofs:
    """Looks up proofs, and remembers them."""

    def __init__(self, settings: Callable[[], ProofSettings], lookup: TxtLookup | None = None) -> None:
        """`lookup` serves tests."""
        self._settings = settings
        self._lookup = lookup or look_up_txt
        self._known: OrderedDict[str, tuple[float, frozenset[str]]] = OrderedDict()  # by record: until when; its texts
        self._limiter = trio.CapacityLimiter(MAX_LOOKUPS)
        self._turns: dict[str, trio.Lock] = {}  # of credentials that are looking up

    @property
    def is_on(self) -> bool:
        """Whether users may prove that a domain is theirs."""
        return self._settings().custom_domains

    async def check(self, name: HostName, credential: str) -> MissingProof | None:
        """None if the DNS says that this credential may use a name."""
        record, text = proof_record(name), proof_text(self._settings().domain, credential)
        turn = self._turns.setdefault(credential, trio.Lock())
        try:
            async with turn, self._limiter:
                texts = await self._texts(record, text)
        except OSError as error:
            return MissingProof(f"could not look up {record}: {reason_of(error)}", is_certain=False)
        finally:
            if not turn.locked():
                self._turns.pop(credential, None)
        if text in texts:
            return None
        found = "the name has no such record" if not texts else "the name has other TXT records only"
        return MissingProof(f'set the DNS record {record}. TXT "{text}" ({found}) and try again', is_certain=True)

    async def _texts(self, record: str, wanted: str) -> Collection[str]:
        settings = self._settings()
        until, texts = self._known.get(record, (-math.inf, frozenset[str]()))
        if trio.current_time() < until:
            return texts
        texts = frozenset(await self._lookup(record, settings.resolver_address, settings.resolver_timeout))
        lasts = settings.custom_domains_cache if wanted in texts else min(MISSING_CACHE, settings.custom_domains_cache)
        self._known[record] = trio.current_time() + lasts, texts
        self._known.move_to_end(record)
        if len(self._known) > MAX_CACHED:
            self._known.popitem(last=False)
        return texts


async def look_up_txt(record: str, server: tuple[str, int] | None, timeout: float) -> Collection[str]:
    """Implements `TxtLookup` with dnspython, which is imported here, since few relays need it."""
    import dns.asyncresolver  # noqa: PLC0415
    import dns.exception  # noqa: PLC0415
    import dns.resolver  # noqa: PLC0415

    try:
        resolver = dns.asyncresolver.Resolver(configure=server is None)
        if server is not None:
            resolver.nameservers, resolver.port = [server[0]], server[1]
        answer = await resolver.resolve(f"{record}.", "TXT", lifetime=timeout, search=False)
    except (dns.resolver.NXDOMAIN, dns.resolver.NoAnswer):
        return ()
    except dns.exception.DNSException as error:
        raise OSError(str(error).rstrip(".") or type(error).__name__) from None
    return [b"".join(each.strings).decode("latin-1") for each in list(answer)[:MAX_TEXTS]]
