"""Guards a site: decides about each request, at once where the decision is remembered, and in a task otherwise.

    examine ──► the address is excluded                    403
            ──► a shared link, or its cookie               303 with a cookie; passes
            ──► auth: a password that was checked lately   passes, without its Authorization field
                      another one                          ──► a worker thread ──► passes, 401; 429 after failures
                      none                                 401, or 403 where only links count
            ──► forward_auth: an answer that is remembered
                              otherwise                    ──► the authentication server ──► passes, its answer; 502
            ──► none of these                              passes

Every task ends with a verdict, also when it is cancelled or fails: a request never passes by mistake.
"""

from __future__ import annotations

import ssl
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import structlog
import trio

from tunneld.auth.http_question import AskFailedError
from tunneld.auth.penalties import Penalties
from tunneld.auth.remembered import Remembered
from tunneld.net.address import HostName
from tunneld.policy.admission import NetworkRules
from tunneld.policy.logins import Login
from tunneld.policy.networks import read_address
from tunneld.policy.rates import LogLimiter, Rate
from tunneld.policy.site_rules import AuthUrl
from tunneld.sites.access import (
    basic_login,
    field_values,
    login_required,
    moved,
    refused,
    source_of,
    too_many,
)
from tunneld.sites.fields import FieldLines, Passage
from tunneld.sites.forward_auth import AuthAnswer, ask, cache_key
from tunneld.sites.links import LinkScope, ShareLinks, cookie, cookies_in, token_in
from tunneld.sites.site import OnVerdict, Request, Verdict
from tunneld.wire.verifier import matches

log: structlog.stdlib.BoundLogger = structlog.get_logger("sites")

REMEMBERED_SECONDS = 300.0
"""How long a checked password is remembered, right or wrong: a browser sends it with every request."""

MAX_CHECKS = 64
"""Passwords that wait for a thread, of the whole relay: some seconds of work."""

MAX_CHECKS_PER_SOURCE = 2
"""Of one site: a source that guesses is not to fill the queue, and one person has one password."""

MAX_QUESTIONS = 256
"""Questions to authentication servers at a time, of the whole relay: a connection and some KiB each."""


FAILURE_LOG_RATE = Rate.parse("60/m")
"""Log lines about the authentication server of one site."""


@dataclass(frozen=True, slots=True)
class GuardSettings:
    """What guards read of the configuration."""

    penalty: float = 1.0  # seconds, of the first failure that counts
    max_penalty: float = 3600.0
    forward_auth: tuple[str, ...] = ()  # the URLs that tunnels may name
    forward_auth_timeout: float = 5.0
    forward_auth_cache: float = 5.0  # seconds


class GuardServices:
    """What the guards of all sites of a relay share."""

    def __init__(self, settings: Callable[[], GuardSettings] = GuardSettings, links: ShareLinks | None = None) -> None:
        """Without `links` there are some that end with the process."""
        self.settings = settings
        self.links = links or ShareLinks()
        self.threads = trio.CapacityLimiter(2)  # one core for passwords is left to everything else
        self.penalties = Penalties[tuple[str, int]]()  # by name and source
        self.checks = 0  # that run or wait
        self.questions = 0
        self._context: ssl.SSLContext | None = None
        self._writing = trio.CapacityLimiter(1)  # the file of the links

    async def issue_link(self, scope: LinkScope, now: float, seconds: float) -> str:
        """See `ShareLinks.issue`."""
        return await trio.to_thread.run_sync(self.links.issue, scope, now, seconds, limiter=self._writing)

    async def revoke_links(self, scope: LinkScope, now: float) -> None:
        """See `ShareLinks.revoke`."""
        await trio.to_thread.run_sync(self.links.revoke, scope, now, limiter=self._writing)

    @property
    def tls_context(self) -> ssl.SSLContext:
        """Verifies authentication servers with the certificates of the system."""
        if self._context is None:
            self._context = ssl.create_default_context()
        return self._context


@dataclass(frozen=True, slots=True)
class GuardRules:
    """What visitors of one site have to meet."""

    name: HostName
    credential: str = ""  # of the tunnel, for shared links
    networks: NetworkRules | None = None
    auth: tuple[Login | str, ...] = ()
    forward_auth: str = ""  # a URL; empty: none
    forward_auth_fields: tuple[str, ...] = ()
    hsts: int = 0  # seconds; 0: off

    @property
    def is_empty(self) -> bool:
        """Whether every request passes as it is."""
        return not (self.networks or self.auth or self.forward_auth or self.hsts)


class SiteGuard:
    """The guard of one site."""

    def __init__(self, rules: GuardRules, services: GuardServices) -> None:
        self._rules = rules
        self._services = services
        self._nursery: trio.Nursery | None = None
        self._is_stopped = False
        self._held: list[tuple[Request, OnVerdict]] = []  # that came before `start`
        self._logins = {login.user: login for login in rules.auth if isinstance(login, Login)}
        self._passwords = Remembered[bool](lambda: REMEMBERED_SECONDS)
        self._running: dict[bytes, list[tuple[Request, OnVerdict]]] = {}  # by the digest of a password under check
        self._sources = Counter[int]()  # of these checks
        self._limiter = LogLimiter(FAILURE_LOG_RATE)
        self._answers = Remembered[Passage](lambda: services.settings().forward_auth_cache)
        self._url = AuthUrl.parse(rules.forward_auth) if rules.forward_auth else None
        self._fields = frozenset(name.lower().encode() for name in rules.forward_auth_fields)
        self._hsts: FieldLines = ((b"Strict-Transport-Security", b"max-age=%d" % rules.hsts),) if rules.hsts else ()

    def start(self, nursery: trio.Nursery) -> None:
        """Decisions that take time are tasks of `nursery` from now on."""
        self._nursery = nursery
        held, self._held = self._held, []
        for request, on_verdict in held:
            self._decide(request, on_verdict)

    def stop(self) -> None:
        """The tunnel has closed: nothing passes any more."""
        self._nursery, self._is_stopped = None, True
        held, self._held = self._held, []
        for request, on_verdict in held:
            on_verdict(refused(request, 503))

    def change_networks(self, networks: NetworkRules | None) -> None:
        """Visitors may come from other networks than before."""
        self._rules = replace(self._rules, networks=networks)

    def examine(self, request: Request, on_verdict: OnVerdict) -> None:
        """See `Site.examine`. A request that comes before the start waits for it."""
        if self._is_stopped:
            on_verdict(refused(request, 503))
        elif self._nursery is None:
            self._held.append((request, on_verdict))
        else:
            self._decide(request, on_verdict)

    def _decide(self, request: Request, on_verdict: OnVerdict) -> None:
        rules = self._rules
        if rules.networks is not None and rules.networks.refusal(read_address(request.client[0])) is not None:
            on_verdict(refused(request, 403))
        elif rules.auth:
            verdict = self._shared_link(request)
            if verdict is not None:
                on_verdict(verdict)
            else:
                self._examine_password(request, on_verdict)
        elif self._url is not None:
            self._examine_by_asking(self._url, request, on_verdict)
        else:
            on_verdict(self._passes(request))

    def _passes(self, request: Request, passage: Passage | None = None) -> Verdict:
        """The verdict on a request that may pass."""
        if not self._hsts or not request.is_secure:
            return passage
        passage = passage or Passage()
        return Passage(passage.removed, passage.added, self._hsts, passage.added_to_response)

    # Shared links

    def _shared_link(self, request: Request) -> Verdict:
        """The verdict on a request with a link or its cookie; None where it has no valid one."""
        head, links, now = request.head, self._services.links, time.time()
        scope = LinkScope(self._rules.credential, self._rules.name)
        if (found := token_in(head.target)) is not None:
            token, target = found
            if (expires := links.expiry(token, scope, now)) is None:
                return refused(request, 403)
            scheme = b"https" if request.is_secure else b"http"
            path = self._rules.name.path or "/"
            set_cookie = cookie(token, expires - now, path, is_secure=request.is_secure)
            location = scheme + b"://" + head.authority + target
            return moved(request, location, (b"Set-Cookie", set_cookie), (b"Referrer-Policy", b"no-referrer"))
        values = field_values(head.fields, b"cookie")
        tokens, rest = cookies_in(b"; ".join(values)) if values else ([], b"")
        if not any(links.expiry(token, scope, now) for token in tokens):
            return None
        return self._passes(request, Passage(frozenset((b"cookie",)), ((b"Cookie", rest),) if rest else ()))

    # Passwords

    def _examine_password(self, request: Request, on_verdict: OnVerdict) -> None:
        values = field_values(request.head.fields, b"authorization")
        if not self._logins:
            on_verdict(refused(request, 403))
            return
        if len(values) != 1 or (login := basic_login(values[0])) is None:
            on_verdict(login_required(request, self._rules.name.name))
            return
        now, digest = trio.current_time(), self._passwords.digest(values[0])
        if (known := self._passwords.get(digest, now)) is not None:
            on_verdict(self._after_password(request, known))
        elif (waiting := self._running.get(digest)) is not None:
            waiting.append((request, on_verdict))
        else:
            self._begin_check(digest, login, request, on_verdict)

    def _begin_check(self, digest: bytes, login: tuple[str, str], request: Request, on_verdict: OnVerdict) -> None:
        services, source = self._services, source_of(request.client)
        blocked = services.penalties.remaining((str(self._rules.name), source), trio.current_time())
        if blocked:
            on_verdict(too_many(request, blocked))
        elif self._sources[source] >= MAX_CHECKS_PER_SOURCE:
            on_verdict(too_many(request, 1))
        elif services.checks >= MAX_CHECKS or self._nursery is None:
            on_verdict(refused(request, 503))
        else:
            services.checks += 1
            self._sources[source] += 1
            self._running[digest] = [(request, on_verdict)]
            self._nursery.start_soon(self._check, digest, login, source)

    async def _check(self, digest: bytes, login: tuple[str, str], source: int) -> None:
        """Check a password in a thread. A wrong one is remembered, too: a client that repeats it guesses nothing."""
        outcome: bool | None = None  # none
        services = self._services
        try:
            outcome = await trio.to_thread.run_sync(
                self._is_right, *login, limiter=services.threads, abandon_on_cancel=True
            )
            now = trio.current_time()
            self._passwords.put(digest, outcome, now)
            if not outcome:
                settings = services.settings()
                key = (str(self._rules.name), source)
                services.penalties.add(key, now, settings.penalty, settings.max_penalty)
        finally:
            services.checks -= 1
            self._sources -= Counter((source,))
            for request, on_verdict in self._running.pop(digest):
                on_verdict(refused(request, 503) if outcome is None else self._after_password(request, outcome))

    def _is_right(self, user: str, password: str) -> bool:
        """Runs in a thread, and takes the same time for a user that does not exist."""
        login = self._logins.get(user)
        verifier = (login or next(iter(self._logins.values()))).verifier
        return matches(verifier, password) and login is not None

    def _after_password(self, request: Request, is_right: bool) -> Verdict:
        if not is_right:
            return login_required(request, self._rules.name.name)
        return self._passes(request, Passage(frozenset((b"authorization",))))

    # Authentication servers

    def _examine_by_asking(self, url: AuthUrl, request: Request, on_verdict: OnVerdict) -> None:
        services = self._services
        digest = self._answers.digest(*cache_key(request))
        if (passage := self._answers.get(digest, trio.current_time())) is not None:
            on_verdict(self._passes(request, passage))
        elif services.questions >= MAX_QUESTIONS or self._nursery is None:
            on_verdict(refused(request, 503))
        elif self._rules.forward_auth not in services.settings().forward_auth:
            self._warn("its URL is not in names.forward_auth any more")
            on_verdict(refused(request, 503))
        else:
            services.questions += 1
            self._nursery.start_soon(self._ask, url, request, digest, on_verdict)

    async def _ask(self, url: AuthUrl, request: Request, digest: bytes, on_verdict: OnVerdict) -> None:
        services, timeout = self._services, self._services.settings().forward_auth_timeout
        verdict: Verdict = refused(request, 502)
        try:
            with trio.move_on_after(timeout) as scope:
                answer = await ask(url, request, services.tls_context)
                verdict = self._after_answer(request, answer, digest)
            if scope.cancelled_caught:
                raise AskFailedError(f"no answer within {timeout:g} s (names.forward_auth_timeout)")
        except AskFailedError as error:
            self._warn(str(error))
        finally:
            services.questions -= 1
            on_verdict(verdict)

    def _warn(self, reason: str) -> None:
        """Nothing passes because of the authentication server: its operator should know."""
        if (left_out := self._limiter.passes(trio.current_time())) is not None:
            host, url = str(self._rules.name), self._rules.forward_auth
            log.warning("request refused", host=host, url=url, reason=reason, left_out=left_out)

    def _after_answer(self, request: Request, answer: AuthAnswer, digest: bytes) -> Verdict:
        if not answer.permits:
            return answer.response(request)
        passage = answer.passage(self._fields)
        self._answers.put(digest, Passage(passage.removed, passage.added), trio.current_time())
        return self._passes(request, passage)
