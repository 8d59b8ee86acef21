"""Which host names need a certificate, and when there is something to do for each.

    want ──► plan ──► due ──► (the manager orders, or asks when to renew) ──► plan

A name needs no order of its own while the configuration or the relay's wildcard has a certificate for it.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import trio

from tunneld.acme.schedule import renewal_at, spread
from tunneld.acme.state import FailureTable
from tunneld.config.certificates import AcmeSettings
from tunneld.tls.certificate import ServerCertificate
from tunneld.tls.store import CertificateStore


@dataclass(slots=True)
class WantedName:
    """A host name that tunnels have, or `*.` and the domain of the relay."""

    name: str
    owner: str  # its orders count against a limit; empty: the relay itself
    users: int = 0
    due_at: float = math.inf  # when there is something to do, in seconds since 1970
    suggestion: float | None = None  # when the authority suggests to renew
    ask_at: float = math.inf  # when it is asked for that
    in_order: trio.Event | None = None  # set when the order that runs is over


class CertificatePlans:
    """See the description of this module."""

    def __init__(self, store: CertificateStore, settings: Callable[[], AcmeSettings], now: Callable[[], float]) -> None:
        self.names: dict[str, WantedName] = {}
        self.failures = FailureTable()
        self.wildcard = ""
        """The name of the relay's own wildcard certificate; empty: it has none."""
        self.changed = trio.Event()
        """Set when something may be due earlier; whatever waits for it makes a new one."""
        self._store = store
        self._settings = settings
        self._now = now
        self._queue: list[tuple[float, str]] = []  # a heap; an entry counts if the name still has its time

    @property
    def next_at(self) -> float:
        """When the next name is due."""
        return self._queue[0][0] if self._queue else math.inf

    def want(self, name: str, owner: str) -> None:
        """Plan for a name; calls are counted."""
        wanted = self.names.setdefault(name, WantedName(name, owner))
        wanted.users += 1
        self.plan(wanted)

    def unwant(self, name: str) -> None:
        """Undo one `want`."""
        wanted = self.names.get(name)
        if wanted is not None:
            wanted.users -= 1
            if wanted.users <= 0:
                del self.names[name]

    def want_wildcard(self, wildcard: str) -> None:
        """Want this certificate for the relay itself, in place of the former one; empty: none."""
        former, self.wildcard = self.wildcard, wildcard
        if former == wildcard:
            return
        if former:
            self.unwant(former)
        if wildcard:
            self.want(wildcard, "")
        self.plan_all()  # names under it need no order, or need one now

    def is_ordered(self, name: str, now: float) -> bool:
        """Whether a certificate for visitors of a host name is being ordered, or will be as soon as there is room."""
        wildcard = "*." + name.partition(".")[2]
        candidates = (self.names.get(name), self.names.get(wildcard))
        return any(each is not None and (each.in_order is not None or each.due_at <= now) for each in candidates)

    def due(self, now: float, has_room: Callable[[], bool]) -> Iterator[WantedName]:
        """Names with something to do, while there is room for it. The caller plans each again when it is done."""
        while self._queue and self._queue[0][0] <= now and has_room():
            at, name = heapq.heappop(self._queue)
            wanted = self.names.get(name)
            if wanted is not None and wanted.due_at == at and wanted.in_order is None:
                wanted.due_at = math.inf
                yield wanted

    def plan(self, wanted: WantedName) -> None:
        """Find out when there is something to do for a name."""
        if not self._settings().enabled or wanted.in_order is not None:
            wanted.due_at = math.inf
            return
        at = self.order_at(wanted)
        if self._store.stored_for(wanted.name) is not None and at < math.inf:
            if wanted.ask_at == math.inf:  # the relay has just started
                wanted.ask_at = self._now() + spread(wanted.name) * self._settings().ask_interval
            at = min(at, wanted.ask_at)
        self.schedule(wanted, at)

    def plan_all(self) -> None:
        """The same for all names, after settings or certificates have changed."""
        for wanted in self.names.values():
            self.plan(wanted)
        self.changed.set()

    def schedule(self, wanted: WantedName, at: float) -> None:
        """Set the time when there is something to do."""
        wanted.due_at = at
        if at < math.inf:
            heapq.heappush(self._queue, (at, wanted.name))
        self.changed.set()

    def order_at(self, wanted: WantedName) -> float:
        """When to order a certificate for a name; `inf`: it needs none."""
        name, settings = wanted.name, self._settings()
        failed = self.failures.get(name)
        earliest = failed.retry_at if failed is not None else 0.0
        parent = "*." + name.partition(".")[2]
        if any(name in each.names or parent in each.names for each in self._store.configured()):
            return math.inf  # the operator renews it
        own = self._renewal_of(wanted, name)
        if own is not None:
            return max(earliest, own)
        if parent == self.wildcard != name:
            return math.inf  # it is there or on its way
        if name.startswith("*.") and not settings.proves_dns:
            return math.inf
        return max(earliest, self._renewal_of(wanted, parent) or 0.0)

    def is_used(self, certificate: ServerCertificate) -> bool:
        """Whether a certificate is for a name that a tunnel has now."""
        return any(
            name in self.names or (name.startswith("*.") and any(_is_under(other, name) for other in self.names))
            for name in certificate.names
        )

    def covering(self, name: str) -> ServerCertificate | None:
        """The certificate that visitors of a name see; for a wildcard, its own."""
        return self._store.stored_for(name) if name.startswith("*.") else self._store.certificate_for(name)

    def _renewal_of(self, wanted: WantedName, name: str) -> float | None:
        """When to renew the stored certificate for `name`; None: there is none."""
        found = self._store.stored_for(name)
        if found is None or found.not_before is None or found.not_after is None:
            return None
        return renewal_at(self._settings(), wanted.name, found.not_before, found.not_after, wanted.suggestion)


def _is_under(name: str, wildcard: str) -> bool:
    return name.partition(".")[2] == wildcard[2:]
