"""Guards of sites: passwords, shared links, authentication servers, networks, HSTS."""

from __future__ import annotations

import time
from base64 import b64encode
from collections.abc import Callable

import pytest
import trio
from trio.testing import MockClock

from tests.sites.conftest import FakeSite, Received, SitesBench
from tunneld.net.address import HostName
from tunneld.net.endpoint import parse_network
from tunneld.policy.admission import AdmissionRefusal, NetworkRules, RefusalKind, Rules
from tunneld.policy.logins import LINK, Login, derive_auth, parse_auth
from tunneld.sites import guard
from tunneld.sites.guard import GuardRules, GuardServices, GuardSettings, SiteGuard
from tunneld.sites.links import LinkScope

NAME = HostName("blog.example")
LOGINS = parse_auth(derive_auth(["alice:correct-horse", "bob:battery-staple"], "blog", b""))
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
UNAUTHORIZED = b"HTTP/1.1 401 Unauthorized"
GOOD = b"Basic " + b64encode(b"alice:correct-horse")


def get(target: bytes = b"/", **fields: bytes) -> bytes:
    lines = [b"%b: %b\r\n" % (name.replace("_", "-").encode(), value) for name, value in fields.items()]
    return b"GET %b HTTP/1.1\r\nHost: blog.example\r\n%b\r\n" % (target, b"".join(lines))


def basic(text: str) -> bytes:
    return b"Basic " + b64encode(text.encode())


Guarded = Callable[..., FakeSite]


@pytest.fixture
def services() -> GuardServices:
    return GuardServices()


@pytest.fixture
def guarded(bench: SitesBench, services: GuardServices, nursery: trio.Nursery) -> Guarded:
    """Adds the site blog.example with a guard."""

    def add(**rules: object) -> FakeSite:
        made = SiteGuard(GuardRules(NAME, **rules), services)  # type: ignore[arg-type]
        made.start(nursery)
        return bench.site("blog.example", guard=made)

    return add


async def answered(visitor: Received, site: FakeSite, request: bytes, number: int = 0) -> list[bytes]:
    """Send a request that passes, and return the head that the hidden server gets."""
    await visitor.far.send_all(request)
    server = await site.server(number)
    head = await server.head()
    await server.far.send_all(OK)
    assert await visitor.response() == (b"HTTP/1.1 200 OK", b"ok")
    return head


async def status(visitor: Received, request: bytes) -> bytes:
    await visitor.far.send_all(request)
    return (await visitor.response())[0]


# Passwords


async def test_a_visitor_without_a_password_is_asked_for_one(bench: SitesBench, guarded: Guarded) -> None:
    guarded(auth=LOGINS)
    visitor = bench.visit()
    await visitor.far.send_all(get())
    head = await visitor.head()
    assert head[0] == UNAUTHORIZED
    assert b'WWW-Authenticate: Basic realm="blog.example", charset="UTF-8"' in head


@pytest.mark.parametrize("user", ["alice:correct-horse", "bob:battery-staple"])
async def test_the_right_password_lets_in_and_is_not_passed_on(bench: SitesBench, guarded: Guarded, user: str) -> None:
    site = guarded(auth=LOGINS)
    head = await answered(bench.visit(), site, get(Authorization=basic(user), Accept=b"*/*"))
    assert b"Accept: */*" in head
    assert not [line for line in head if b"authorization" in line.lower()]


@pytest.mark.parametrize(
    "value",
    [basic("alice:wrong-horse"), basic("mallory:correct-horse"), b"Bearer x", b"Basic !!!", basic("alice"), b"Basic"],
)
async def test_anything_else_does_not(bench: SitesBench, guarded: Guarded, value: bytes) -> None:
    site = guarded(auth=LOGINS)
    assert await status(bench.visit(), get(Authorization=value)) == UNAUTHORIZED
    assert not site.streams


async def test_two_authorization_fields_are_none(bench: SitesBench, guarded: Guarded) -> None:
    guarded(auth=LOGINS)
    request = b"GET / HTTP/1.1\r\nHost: blog.example\r\nAuthorization: %b\r\nAuthorization: %b\r\n\r\n" % (GOOD, GOOD)
    assert await status(bench.visit(), request) == UNAUTHORIZED


async def test_a_body_waits_for_the_verdict_on_a_connection_with_an_open_stream(
    bench: SitesBench, guarded: Guarded
) -> None:
    """The second password is checked while the stream of the first request is open."""
    site = guarded(auth=LOGINS)
    visitor = bench.visit()
    await answered(visitor, site, get(Authorization=GOOD))
    post = b"POST / HTTP/1.1\r\nHost: blog.example\r\nAuthorization: %b\r\nContent-Length: 3\r\n\r\nhey"
    await visitor.far.send_all(post % basic("bob:battery-staple"))
    server = await site.server()
    assert (await server.head())[0] == b"POST / HTTP/1.1"
    assert await server.exactly(3) == b"hey"


async def test_a_stream_that_ends_during_a_check_is_not_used(bench: SitesBench, guarded: Guarded) -> None:
    site = guarded(auth=LOGINS)
    visitor = bench.visit()
    await answered(visitor, site, get(Authorization=GOOD))
    await visitor.far.send_all(get(Authorization=basic("mallory:correct-horse")))
    await site.servers[0].aclose()
    assert (await visitor.response())[0] == UNAUTHORIZED
    assert len(site.streams) == 1


async def test_upgrades_and_head_requests_need_a_password_too(bench: SitesBench, guarded: Guarded) -> None:
    site = guarded(auth=LOGINS)
    assert await status(bench.visit(), get(Connection=b"Upgrade", Upgrade=b"websocket")) == UNAUTHORIZED
    visitor = bench.visit()
    await visitor.far.send_all(b"HEAD / HTTP/1.1\r\nHost: blog.example\r\n\r\n")
    assert (await visitor.head())[0] == UNAUTHORIZED
    visitor = bench.visit()
    await visitor.far.send_all(get(Authorization=GOOD, Connection=b"Upgrade", Upgrade=b"websocket"))
    server = await site.server()
    head = await server.head()
    assert b"Upgrade: websocket" in head
    await server.far.send_all(
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nhi"
    )
    assert (await visitor.head())[0] == b"HTTP/1.1 101 Switching Protocols"
    assert await visitor.exactly(2) == b"hi"


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The passwords that were checked; a check takes no time."""
    secrets: list[str] = []

    def matches(verifier: object, secret: str) -> bool:
        secrets.append(secret)
        return secret == "correct-horse"

    monkeypatch.setattr(guard, "matches", matches)
    return secrets


async def test_a_password_is_checked_once_for_all_connections(
    bench: SitesBench, guarded: Guarded, checked: list[str]
) -> None:
    site = guarded(auth=LOGINS)
    visitors = [bench.visit() for _ in range(3)]
    for visitor in visitors:
        await visitor.far.send_all(get(Authorization=GOOD))
    for number in range(3):
        server = await site.server(number)
        await server.head()
        await server.far.send_all(OK)
    for visitor in visitors:
        assert await visitor.response() == (b"HTTP/1.1 200 OK", b"ok")
    assert checked == ["correct-horse"]


async def test_a_decision_is_forgotten_after_a_while(
    bench: SitesBench,
    guarded: Guarded,
    checked: list[str],
    mock_clock: MockClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(guard, "REMEMBERED_SECONDS", 50.0)
    guarded(auth=LOGINS)
    for _ in range(2):
        assert await status(bench.visit(), get(Authorization=basic("alice:wrong"))) == UNAUTHORIZED
    assert len(checked) == 1
    mock_clock.jump(guard.REMEMBERED_SECONDS)
    assert await status(bench.visit(), get(Authorization=basic("alice:wrong"))) == UNAUTHORIZED
    assert len(checked) == 2


async def test_guesses_earn_a_penalty_for_their_source_only(
    bench: SitesBench, guarded: Guarded, services: GuardServices, checked: list[str], mock_clock: MockClock
) -> None:
    services.settings = lambda: GuardSettings(penalty=10.0, max_penalty=100.0)
    site = guarded(auth=LOGINS)
    for number in range(3):
        assert await status(bench.visit(), get(Authorization=basic(f"alice:{number}"))) == UNAUTHORIZED
    visitor = bench.visit()
    await visitor.far.send_all(get(Authorization=GOOD))
    head = await visitor.head()
    assert head[0] == b"HTTP/1.1 429 Too Many Requests"
    assert b"Retry-After: 10" in head
    assert len(checked) == 3
    assert await status(bench.visit(), get()) == UNAUTHORIZED
    mock_clock.jump(10)
    await answered(bench.visit(), site, get(Authorization=GOOD))


async def test_a_source_has_few_checks_at_a_time(bench: SitesBench, guarded: Guarded, services: GuardServices) -> None:
    guarded(auth=LOGINS)
    services.threads.total_tokens = 1
    await services.threads.acquire_on_behalf_of("the test")
    visitors = [bench.visit() for _ in range(guard.MAX_CHECKS_PER_SOURCE)]
    for number, visitor in enumerate(visitors):
        await visitor.far.send_all(get(Authorization=basic(f"alice:{number}")))
    await trio.testing.wait_all_tasks_blocked()
    assert await status(bench.visit(), get(Authorization=GOOD)) == b"HTTP/1.1 429 Too Many Requests"
    services.threads.release_on_behalf_of("the test")
    for visitor in visitors:
        assert (await visitor.response())[0] == UNAUTHORIZED
    assert services.checks == 0


async def test_checks_of_the_relay_are_bounded(bench: SitesBench, guarded: Guarded, services: GuardServices) -> None:
    guarded(auth=LOGINS)
    services.checks = guard.MAX_CHECKS
    assert await status(bench.visit(), get(Authorization=GOOD)) == b"HTTP/1.1 503 Service Unavailable"


async def test_a_request_does_not_pass_where_the_tunnel_ends_during_its_check(
    bench: SitesBench, services: GuardServices
) -> None:
    await services.threads.acquire_on_behalf_of("a")
    await services.threads.acquire_on_behalf_of("b")
    made = SiteGuard(GuardRules(NAME, auth=LOGINS), services)
    site = bench.site("blog.example", guard=made)
    visitor = bench.visit()
    async with trio.open_nursery() as nursery:
        made.start(nursery)
        await visitor.far.send_all(get(Authorization=GOOD))
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert (await visitor.response())[0] == b"HTTP/1.1 503 Service Unavailable"
    assert not site.streams


# Shared links


async def test_a_link_sets_a_cookie_and_leads_to_the_clean_address(
    bench: SitesBench, guarded: Guarded, services: GuardServices
) -> None:
    site = guarded(auth=LOGINS)
    token = services.links.issue(LinkScope("", NAME), time.time(), 60).encode()
    visitor = bench.visit()
    await visitor.far.send_all(get(b"/a?x=1&tunneld-share=%b&y=2" % token))
    head = await visitor.head()
    assert head[0] == b"HTTP/1.1 303 See Other"
    assert b"Location: http://blog.example/a?x=1&y=2" in head
    (cookie,) = [line[12:] for line in head if line.startswith(b"Set-Cookie: ")]
    value, *attributes = cookie.split(b"; ")
    assert attributes[1:] == [b"Path=/", b"HttpOnly", b"SameSite=Lax"]
    passed = await answered(visitor, site, get(Cookie=b"a=b; " + value + b"; c=d"))
    assert b"Cookie: a=b; c=d" in passed
    assert await status(bench.visit(), get(Cookie=b"tunneld-share=" + b"A" * 48)) == UNAUTHORIZED


@pytest.mark.parametrize("scope", [LinkScope("", HostName("other.example")), LinkScope("mallory", NAME)])
async def test_a_link_of_another_site_opens_nothing(
    bench: SitesBench, guarded: Guarded, services: GuardServices, scope: LinkScope
) -> None:
    guarded(auth=LOGINS)
    token = services.links.issue(scope, time.time(), 60).encode()
    assert await status(bench.visit(), get(b"/?tunneld-share=" + token)) == b"HTTP/1.1 403 Forbidden"
    assert await status(bench.visit(), get(Cookie=b"tunneld-share=" + token)) == UNAUTHORIZED


async def test_only_links_count_where_there_are_no_passwords(bench: SitesBench, guarded: Guarded) -> None:
    guarded(auth=(LINK,))
    assert await status(bench.visit(), get(Authorization=GOOD)) == b"HTTP/1.1 403 Forbidden"


# Networks, HSTS


async def test_an_excluded_address_is_not_asked_for_a_password(bench: SitesBench, guarded: Guarded) -> None:
    guarded(auth=LOGINS, networks=NetworkRules(Rules(deny=(parse_network("192.0.2.0/24"),))))
    assert await status(bench.visit(), get(Authorization=GOOD)) == b"HTTP/1.1 403 Forbidden"


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        (RefusalKind.ADDRESS, b"HTTP/1.1 403 Forbidden"),
        (RefusalKind.RATE, b"HTTP/1.1 429 Too Many Requests"),
        (RefusalKind.PER_SOURCE, b"HTTP/1.1 429 Too Many Requests"),
        (RefusalKind.FULL, b"HTTP/1.1 503 Service Unavailable"),
    ],
)
async def test_a_refused_visitor_is_told_what_it_can_do(bench: SitesBench, kind: RefusalKind, line: bytes) -> None:
    bench.site("blog.example", refusal=AdmissionRefusal(kind, "for a reason"))
    assert await status(bench.visit(), get()) == line


async def test_hsts_replaces_that_of_the_server_and_is_only_sent_in_tls(bench: SitesBench, guarded: Guarded) -> None:
    site = guarded(hsts=3600)
    visitor = bench.visit(secure=True)
    await visitor.far.send_all(get())
    server = await site.server()
    await server.head()
    await server.far.send_all(b"HTTP/1.1 200 OK\r\nStrict-Transport-Security: max-age=1\r\nContent-Length: 0\r\n\r\n")
    lines = [line for line in await visitor.head() if line.startswith(b"Strict")]
    assert lines == [b"Strict-Transport-Security: max-age=3600"]
    visitor = bench.visit()
    await visitor.far.send_all(get())
    server = await site.server(1)
    await server.head()
    await server.far.send_all(OK)
    assert not [line for line in await visitor.head() if line.startswith(b"Strict")]


def test_logins_do_not_print_their_verifiers() -> None:
    login = LOGINS[0]
    assert isinstance(login, Login)
    assert "SCRAM" not in f"{login}"
    assert login.verifier.reveal() not in repr(login)
