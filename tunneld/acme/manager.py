"""Orders and renews the certificates of all host names of a relay.

    want(name)  ──► planned ──► ordered in a worker thread ──► CertificateStore ──► planned for its renewal
                       ▲                    └ failed: an event, a log line, tried again later
                       └────────────────────┘

The ports for visitors use what the store has; a handshake for a name that has no certificate yet may wait until its
order is over. Nothing is remembered of an order that
was interrupted, so after a crash the name is simply ordered again. What the authority is asked is limited, see
`OrderLimits`; that a requester may have a name is checked before `want`.

    run
    └─ order ×1..max_parallel       each waits for one worker thread
"""

from __future__ import annotations

import math
import ssl
import time
from collections.abc import Awaitable, Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import trio

from tunneld.acme import report
from tunneld.acme.plans import CertificatePlans, WantedName
from tunneld.acme.schedule import OrderLimits
from tunneld.acme.state import MAX_FAILURES, Issued, account_folder
from tunneld.config.certificates import AcmeSettings
from tunneld.errors import CertificateError, TunneldError, UsageError
from tunneld.log import Logger
from tunneld.policy.rates import LogLimiter, Rate
from tunneld.tls.certificate import ServerCertificate
from tunneld.tls.store import CertificateStore
from tunneld.wire.lines import Item

log = Logger("acme")

Clock = Callable[[], float]
InThread = Callable[[Callable[[], Any]], Awaitable[Any]]

KEEP_EXPIRED = 7 * 86400.0
"""Seconds after which the expired certificate of a name that is not used is removed: its tunnel may have been away for
a holiday, and an expired certificate costs a file.
"""
CLEAN_INTERVAL = 86400.0
"Seconds."
ONCE_A_DAY = Rate(1, 86400)


class OrderWorker(Protocol):
    """What does the work: `orders.Orders`. All methods block."""

    def obtain(self, name: str, attempt: int, /) -> Issued:
        """See `Orders`."""

    def renewal_time(self, file: Path, /) -> tuple[float | None, float]:
        """See `Orders`."""

    def trial(self, name: str, on_step: Callable[[str], None], /) -> None:
        """See `Orders`."""


class CertificateManager:
    """See the description of this module. Implements `PortOrders` of the shared ports."""

    def __init__(
        self,
        store: CertificateStore,
        settings: Callable[[], AcmeSettings],
        state: Path | None,
        *,
        domain: Callable[[], str] = lambda: "",
        challenges: Callable[[], Collection[str]] = lambda: ("tls-alpn-01", "http-01"),
        worker: Callable[[AcmeSettings], OrderWorker] | None = None,
        now: Clock = time.time,
        in_thread: InThread | None = None,
    ) -> None:
        """`domain` is the relay's own, for the wildcard; its ports answer `challenges`. The last three serve tests."""
        self.on_failed: Callable[[str, str], None] = lambda _name, _reason: None
        """Called with a name and the reason after each failed order."""
        self.on_stored: Callable[[str], None] = lambda _name: None
        """Called with a name after each order that gave a certificate."""
        self._store = store
        self._settings = settings
        self._state = state
        self._domain = domain
        self._challenges = challenges
        self._new_worker = worker or self._orders
        self._now = now
        self._in_thread = in_thread or partial(_in_thread, trio.CapacityLimiter(math.inf))
        self._answers: dict[str, bytes] = {}
        self._contexts: dict[str, ssl.SSLContext] = {}
        self._plans = CertificatePlans(store, settings, now)
        self._orders_running = 0
        self._over = trio.Event()  # set when an order is over; each has a new one
        self._applied: AcmeSettings | None = None  # the settings of the next three
        self._worker: OrderWorker | None = None
        self._limits = OrderLimits(settings().order_rate, settings().owner_rate)
        self._log_limiter = LogLimiter(ONCE_A_DAY, MAX_FAILURES)
        store.is_used = self._plans.is_used

    # For the shared ports

    def http_answer(self, token: str) -> bytes | None:
        """The answer to http-01; see `PortOrders`."""
        return self._answers.get(token)

    def tls_context(self, name: str) -> ssl.SSLContext | None:
        """The answer to tls-alpn-01; see `PortOrders`."""
        return self._contexts.get(name)

    def is_ordered(self, name: str) -> bool:
        """Whether a certificate for visitors of a host name is on its way; see `PortOrders`."""
        return self._plans.is_ordered(name, self._now())

    async def order_over(self) -> None:
        """Return when an order is over, or put off; see `PortOrders`."""
        await self._over.wait()

    # For tunnels

    def want(self, name: str, owner: str) -> None:
        """Get and keep a certificate for a host name in lower case, from when a tunnel with it opens until `unwant`.

        The caller has checked that `owner` may have the name. Calls are counted.
        """
        self._plans.want(name, owner)

    def unwant(self, name: str) -> None:
        """Undo one `want`. A certificate that was obtained stays, for when the tunnel opens again."""
        self._plans.unwant(name)
        self._note_over()

    def failure(self, name: str) -> str:
        """Why there is no new certificate for a name; empty if nothing has failed."""
        failed = self._plans.failures.get(name)
        return failed.reason if failed is not None else ""

    # For operators

    def certificates(self) -> list[Item]:
        """One item for each certificate for host names, and for each name that waits for one. Times are in seconds from
        now.
        """
        return list(report.describe(self._store, self._plans, self._now()))

    def problems(self) -> list[str]:
        """Which wanted names have no certificate, in a few words each, for the status."""
        return report.problems(self._plans, self._now())

    async def renew(self, name: str) -> ServerCertificate:
        """Order a new certificate for a name now, whatever the limits say. Raises `TunneldError` if that fails."""
        self._check_enabled()
        wanted = self._plans.names.get(name)
        if wanted is None:
            if self._store.stored_for(name) is None and name != self._wildcard():
                raise UsageError(f"no certificate and no open tunnel has the host name {name!r}; see `certificates`")
            wanted = WantedName(name, "")
        while wanted.in_order is not None:
            await wanted.in_order.wait()
        return await self._order(wanted)

    async def trial(self, name: str, on_step: Callable[[str], None]) -> None:
        """Order a certificate for a name that is thrown away. `on_step` is called in a worker thread. Raises
        `TunneldError` that says what failed.
        """
        self._check_enabled()
        await self._in_thread(partial(self._get_worker().trial, name, on_step))

    def reconfigure(self) -> None:
        """Apply changed settings of the relay, or certificates that were loaded again."""
        self._worker = None
        self._plans.plan_all()

    # The task

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Place the orders that are due, until cancelled."""
        async with trio.open_nursery() as nursery:
            task_status.started()
            clean_at = -math.inf
            while True:
                self._plans.changed = trio.Event()
                self._apply_settings()
                now = self._now()
                if now >= clean_at:
                    self._clean(now)
                    clean_at = now + CLEAN_INTERVAL
                for wanted in self._plans.due(now, self._has_room):
                    self._begin(wanted, nursery, now)
                next_at = min(clean_at, self._plans.next_at if self._has_room() else math.inf)
                with trio.move_on_after(max(0.0, next_at - self._now())):
                    await self._plans.changed.wait()

    def _has_room(self) -> bool:
        return self._orders_running < self._settings().max_parallel

    def _begin(self, wanted: WantedName, nursery: trio.Nursery, now: float) -> None:
        """Start what is due: the question when to renew, or an order."""
        if not self._settings().enabled:
            return
        order_at = self._plans.order_at(wanted)
        if order_at > now:  # only the question is due; or the plan has changed
            certificate = self._store.stored_for(wanted.name)
            if certificate is None or wanted.ask_at > now:
                self._plans.plan(wanted)
                return
            wanted.in_order = trio.Event()
            self._orders_running += 1
            nursery.start_soon(self._ask, wanted, certificate)
            return
        if self._store.stored_for(wanted.name) is None:
            wait, limit = self._limits.take(wanted.owner, now)
            if wait > 0:
                self._put_off(wanted, now + wait, limit)
                return
        wanted.in_order = trio.Event()
        self._orders_running += 1
        nursery.start_soon(self._order_and_report, wanted)

    def _put_off(self, wanted: WantedName, until: float, limit: str) -> None:
        """There were too many orders already."""
        reason = f"limit of orders reached (acme.{limit})"
        self._plans.schedule(wanted, until)
        self._note_over()
        passed = self._log_limiter.passes(self._now(), (wanted.name, limit))
        if passed is not None:
            log.warning("certificate not ordered", name=wanted.name, owner=wanted.owner, reason=reason)
            self.on_failed(wanted.name, reason)

    # Orders

    async def _order_and_report(self, wanted: WantedName) -> None:
        assert wanted.in_order is not None
        try:
            await self._order(wanted, wanted.in_order)
        except TunneldError:
            pass  # it has been reported
        finally:
            self._orders_running -= 1

    async def _order(self, wanted: WantedName, event: trio.Event | None = None) -> ServerCertificate:
        """Place an order and use its certificate. Raises `TunneldError`, which has been reported."""
        wanted.in_order = event if event is not None else trio.Event()
        name, former = wanted.name, self._plans.failures.get(wanted.name)
        worker, attempt = self._get_worker(), former.count if former is not None else 0
        log.info("certificate ordered", name=name)
        try:
            written = await self._in_thread(partial(self._obtain, worker, name, attempt))
        except TunneldError as error:
            await self._on_failure(wanted, str(error))
            raise
        except Exception as error:
            log.exception("certificate not ordered: internal error", name=name)
            await self._on_failure(wanted, f"internal error: {error!r}")
            raise CertificateError(f"could not get a certificate for {name}: internal error") from error
        else:
            self._store.use(written)
            self.on_stored(name)
            wanted.suggestion, wanted.ask_at = None, self._now() + self._settings().ask_interval
            if self._plans.failures.forget(name):
                await self._in_thread(self._plans.failures.save)
            certificate: ServerCertificate = written[0]
            return certificate
        finally:
            wanted.in_order.set()
            wanted.in_order = None
            if name.startswith("*."):
                self.reconfigure()  # names under it need no order now
            else:
                self._plans.plan(wanted)
            self._note_over()

    def _note_over(self) -> None:
        """Wake what waits for an order."""
        over, self._over = self._over, trio.Event()
        over.set()

    def _obtain(self, worker: OrderWorker, name: str, attempt: int) -> tuple[ServerCertificate, ssl.SSLContext]:
        """In a worker thread: the whole order, the files included."""
        issued = worker.obtain(name, attempt)
        return self._store.write(issued.chain, issued.key)

    async def _on_failure(self, wanted: WantedName, reason: str) -> None:
        settings, now = self._settings(), self._now()
        is_first = self._plans.failures.get(wanted.name) is None
        failure = self._plans.failures.record(wanted.name, reason, now, settings.retry, settings.max_retry)
        if (self._log_limiter.passes(now, wanted.name) is not None) or is_first:
            retry = round(failure.retry_at - now)
            log.warning("no certificate", name=wanted.name, owner=wanted.owner, reason=reason, retry_in=retry)
        self.on_failed(wanted.name, reason)
        await self._in_thread(self._plans.failures.save)

    async def _ask(self, wanted: WantedName, certificate: ServerCertificate) -> None:
        """Ask the authority when to renew. It is no failure if it does not answer: the dates of the certificate say
        enough.
        """
        now, settings = self._now(), self._settings()
        ask_at = now + settings.ask_interval
        try:
            ask = partial(self._get_worker().renewal_time, certificate.files.certificate)
            wanted.suggestion, again = await self._in_thread(ask)
            ask_at = max(ask_at, min(again, now + CLEAN_INTERVAL))
        except (TunneldError, OSError) as error:
            log.info("could not ask when to renew", name=wanted.name, reason=str(error))
        finally:
            assert wanted.in_order is not None
            wanted.in_order.set()
            wanted.in_order = None
            wanted.ask_at = ask_at
            self._orders_running -= 1
            self._plans.plan(wanted)

    # Settings and state

    def _apply_settings(self) -> None:
        """Use changed settings for the next order."""
        settings = self._settings()
        self._plans.want_wildcard(self._wildcard())
        if settings == self._applied:
            return
        former, self._applied = self._applied, settings
        self._worker = None
        rates = settings.order_rate, settings.owner_rate
        if rates != self._limits.rates:
            self._limits = OrderLimits(*rates)
        if self._state is not None and (former is None or former.directory != settings.directory):
            self._plans.failures.load(account_folder(self._state, settings.directory))
        self._plans.plan_all()

    def _wildcard(self) -> str:
        """The name of the relay's own wildcard certificate; empty: it has none."""
        settings, domain = self._settings(), self._domain()
        return f"*.{domain}" if domain and settings.enabled and settings.wildcard and settings.proves_dns else ""

    def _check_enabled(self) -> None:
        if not self._settings().enabled:
            raise UsageError("no certificate can be ordered; set acme.enabled and acme.agree in the configuration")

    def _get_worker(self) -> OrderWorker:
        self._apply_settings()
        if self._worker is None:
            self._worker = self._new_worker(self._settings())
        return self._worker

    def _orders(self, settings: AcmeSettings) -> OrderWorker:
        from tunneld.acme.orders import Orders  # noqa: PLC0415  # its libraries take 0.3 s, and are an extra

        if self._state is None:
            raise UsageError("no folder for certificates; set daemon.state")
        return Orders(settings, self._state, self._answers, self._contexts, tuple(self._challenges()))

    def _clean(self, now: float) -> None:
        """Remove certificates that have expired and that no name needs."""
        for each in self._store.stored():
            if each.not_after is not None and each.not_after + KEEP_EXPIRED < now and not self._plans.is_used(each):
                log.info("expired certificate removed", names=list(each.names))
                self._store.remove(each)
        self._plans.failures.forget_old(now - KEEP_EXPIRED, self._plans.names)


async def _in_thread(limiter: trio.CapacityLimiter, work: Callable[[], Any]) -> Any:
    """Run blocking work in a worker thread. A relay that stops does not wait for it. The limiter is of its own, so that
    orders that hang keep no thread from anything else; `max_parallel` bounds them.
    """
    return await trio.to_thread.run_sync(work, abandon_on_cancel=True, limiter=limiter)
