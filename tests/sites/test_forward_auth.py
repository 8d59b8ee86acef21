"""Questions to an authentication server: what it is told, what its answers do, and how they fail."""

from __future__ import annotations

import ssl
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import trio
import trustme
from trio.testing import MockClock

from tests.sites.conftest import FakeSite, Received, SitesBench
from tunneld.auth import http_question
from tunneld.net.address import HostName
from tunneld.sites import guard
from tunneld.sites.guard import GuardRules, GuardServices, GuardSettings, SiteGuard

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
YES = b"HTTP/1.1 200 OK\r\nRemote-User: alice\r\nX-Other: 1\r\nSet-Cookie: s=2\r\nContent-Length: 0\r\n\r\n"
LOGIN = b"HTTP/1.1 302 Found\r\nLocation: https://login.example/\r\nConnection: close\r\nContent-Length: 5\r\n\r\nlogin"


@dataclass
class AuthServer:
    """Answers each question with `answer`; None: never."""

    answer: bytes | None = YES
    questions: list[list[bytes]] = field(default_factory=list)
    port: int = 0

    async def handle(self, stream: trio.abc.Stream) -> None:
        async with stream:
            with suppress(trio.BrokenResourceError):  # the relay does not trust this server
                await self._answer(stream)

    async def _answer(self, stream: trio.abc.Stream) -> None:
        self.questions.append(await Received(stream).head())
        if self.answer is None:
            await stream.receive_some()  # until the relay gives up
            return
        await stream.send_all(self.answer)


@dataclass
class AuthBench:
    server: AuthServer
    services: GuardServices
    site: FakeSite
    settings: GuardSettings
    url: str


Asked = Callable[..., Awaitable[AuthBench]]


@pytest.fixture
def asked(bench: SitesBench, nursery: trio.Nursery) -> Asked:
    """Makes a site blog.example that asks an authentication server."""

    async def make(answer: bytes | None = YES, tls: ssl.SSLContext | None = None, **settings: float) -> AuthBench:
        server = AuthServer(answer)
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        server.port = listeners[0].socket.getsockname()[1]
        serving: list[Any] = [trio.SSLListener(one, tls) for one in listeners] if tls else list(listeners)
        await nursery.start(partial(trio.serve_listeners, server.handle, serving))
        url = f"{'https' if tls else 'http'}://127.0.0.1:{server.port}/verify?x=1"
        made = GuardSettings(forward_auth=(url,), **settings)
        services = GuardServices(lambda: made)
        rules = GuardRules(HostName("blog.example"), forward_auth=url, forward_auth_fields=("Remote-User",))
        site_guard = SiteGuard(rules, services)
        site_guard.start(nursery)
        return AuthBench(server, services, bench.site("blog.example", guard=site_guard), made, url)

    return make


def get(target: bytes = b"/a?b", **fields: bytes) -> bytes:
    lines = [b"%b: %b\r\n" % (name.replace("_", "-").encode(), value) for name, value in fields.items()]
    return b"GET %b HTTP/1.1\r\nHost: blog.example\r\n%b\r\n" % (target, b"".join(lines))


async def test_a_request_passes_with_the_listed_fields_and_without_its_own(bench: SitesBench, asked: Asked) -> None:
    made = await asked()
    visitor = bench.visit()
    request = get(Cookie=b"s=1", Remote_User=b"root", Authorization=b"Bearer x", X_Other=b"mine")
    forged = request.replace(b"\r\n\r\n", b"\r\nremote_user: root\r\n\r\n")
    await visitor.far.send_all(forged)
    server = await made.site.server()
    head = await server.head()
    assert [line for line in head if b"user" in line.lower()] == [b"Remote-User: alice"]
    assert {b"X-Other: mine", b"Cookie: s=1", b"Authorization: Bearer x"} <= set(head)
    await server.far.send_all(OK)
    assert b"Set-Cookie: s=2" in await visitor.head()
    (question,) = made.server.questions
    assert question[0] == b"GET /verify?x=1 HTTP/1.0"
    assert {
        b"Host: 127.0.0.1:%d" % made.server.port,
        b"X-Forwarded-Method: GET",
        b"X-Forwarded-Uri: /a?b",
        b"X-Forwarded-Host: blog.example",
        b"X-Forwarded-Proto: http",
        b"X-Forwarded-For: 192.0.2.7",
        b"Cookie: s=1",
        b"Authorization: Bearer x",
    } <= set(question)


async def test_any_other_answer_goes_to_the_visitor(bench: SitesBench, asked: Asked) -> None:
    made = await asked(LOGIN)
    visitor = bench.visit()
    for _ in range(2):
        await visitor.far.send_all(get())
        head = await visitor.head()
        assert head[0].startswith(b"HTTP/1.1 302 ")
        assert b"Location: https://login.example/" in head
        assert await visitor.exactly(5) == b"login"
    assert not made.site.streams


async def test_an_answer_holds_for_the_same_request_for_a_while(
    bench: SitesBench, asked: Asked, autojump_clock: MockClock
) -> None:
    made = await asked()
    visitor = bench.visit()

    async def pass_with(request: bytes, number: int) -> None:
        await visitor.far.send_all(request)
        server = await made.site.server()
        await server.head()
        await server.far.send_all(OK)
        assert (await visitor.response())[0] == b"HTTP/1.1 200 OK"
        assert len(made.server.questions) == number

    await pass_with(get(Cookie=b"s=1"), 1)
    await pass_with(get(Cookie=b"s=1"), 1)
    await pass_with(get(Cookie=b"s=2"), 2)
    await pass_with(get(b"/b", Cookie=b"s=1"), 3)
    await pass_with(get(Cookie=b"s=1", Authorization=b"s=1"), 4)
    await trio.sleep(made.settings.forward_auth_cache)
    await pass_with(get(Cookie=b"s=1"), 5)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200 OK\r\n",
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
        b"HTTP/1.1 403 No\r\nContent-Length: 9\r\n\r\nshort",
        b"HTTP/1.1 403 No\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 403 No\r\nContent-Length: 9999999\r\n\r\n",
        b"HTTP/1.1 403 No\r\n\r\n" + bytes(http_question.MAX_ANSWER_BODY + 1),
        b"X" * (http_question.MAX_ANSWER_HEAD + 1),
    ],
)
async def test_an_answer_that_makes_no_sense_is_a_502(bench: SitesBench, asked: Asked, answer: bytes) -> None:
    made = await asked(answer)
    visitor = bench.visit()
    await visitor.far.send_all(get())
    assert (await visitor.response())[0] == b"HTTP/1.1 502 Bad Gateway"
    assert not made.site.streams


async def test_a_server_that_does_not_answer_is_a_502_after_the_timeout(
    bench: SitesBench, asked: Asked, autojump_clock: MockClock
) -> None:
    await asked(None, forward_auth_timeout=7.0)
    visitor = bench.visit()
    start = trio.current_time()
    await visitor.far.send_all(get())
    assert (await visitor.response())[0] == b"HTTP/1.1 502 Bad Gateway"
    assert trio.current_time() - start == pytest.approx(7.0)


async def test_a_server_that_cannot_be_reached_is_a_502(
    bench: SitesBench, services_of: Callable[..., FakeSite]
) -> None:
    services_of("http://127.0.0.1:1/")
    visitor = bench.visit()
    await visitor.far.send_all(get())
    assert (await visitor.response())[0] == b"HTTP/1.1 502 Bad Gateway"


@pytest.fixture
def services_of(bench: SitesBench, nursery: trio.Nursery) -> Callable[..., FakeSite]:
    def make(url: str, allowed: tuple[str, ...] | None = None) -> FakeSite:
        settings = GuardSettings(forward_auth=(url,) if allowed is None else allowed)
        services = GuardServices(lambda: settings)
        made = SiteGuard(GuardRules(HostName("blog.example"), forward_auth=url), services)
        made.start(nursery)
        return bench.site("blog.example", guard=made)

    return make


async def test_a_url_that_the_operator_has_removed_is_not_asked(
    bench: SitesBench, services_of: Callable[..., FakeSite]
) -> None:
    services_of("http://127.0.0.1:1/", ())
    visitor = bench.visit()
    await visitor.far.send_all(get())
    assert (await visitor.response())[0] == b"HTTP/1.1 503 Service Unavailable"


async def test_questions_are_bounded(bench: SitesBench, asked: Asked) -> None:
    made = await asked()
    made.services.questions = guard.MAX_QUESTIONS
    visitor = bench.visit()
    await visitor.far.send_all(get())
    assert (await visitor.response())[0] == b"HTTP/1.1 503 Service Unavailable"
    assert not made.server.questions


@contextmanager
def trusting(services: GuardServices, ca: trustme.CA) -> Iterator[None]:
    context = ssl.create_default_context()
    ca.configure_trust(context)
    services._context = context
    yield


@pytest.mark.parametrize("is_trusted", [True, False])
async def test_the_certificate_of_the_server_is_verified(bench: SitesBench, asked: Asked, is_trusted: bool) -> None:
    ca = trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    ca.issue_cert("127.0.0.1").configure_cert(context)
    made = await asked(LOGIN, tls=context)
    visitor = bench.visit()
    with trusting(made.services, ca if is_trusted else trustme.CA()):
        await visitor.far.send_all(get())
        line = (await visitor.head())[0]
    assert line.startswith(b"HTTP/1.1 302" if is_trusted else b"HTTP/1.1 502")
