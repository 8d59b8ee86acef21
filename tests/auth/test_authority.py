"""The operator's authorization service: what it is asked, what its answers do, and every way in which it can fail."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.support.peers import connect, is_dropped, reset
from tests.support.visitors import ME, open_tunnel, refused, until_waiting
from tunneld.auth.authority import MAX_ANSWER, MAX_REASON, Authority
from tunneld.auth.http_question import AskFailedError
from tunneld.backends import BACKENDS
from tunneld.config.schema import ControlSettings, Settings, TunnelSettings
from tunneld.directory.service import TunnelService
from tunneld.engine.engine import Engine
from tunneld.errors import LimitReachedError, NotAllowedError
from tunneld.policy.access import EVERYBODY, Grant, Role
from tunneld.policy.options import TunnelOptions
from tunneld.tunnel.tunnel import Tunnel

ALICE, ROOT = Grant("alice"), Grant("root", Role.ADMIN)
YES, NO = b'{"allow": true}', b'{"allow": false, "reason": "not today"}'
EXAMPLE = Path(__file__).parents[2] / "config/examples/authorize.py"


@dataclass
class Service:
    """An HTTP server that answers each question with `body`; None: never."""

    body: bytes | None = YES
    status: bytes = b"200 OK"
    questions: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""

    async def handle(self, stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError):  # the relay stops waiting
            await self._answer(stream)

    async def _answer(self, stream: trio.SocketStream) -> None:
        data = b""
        while b"\r\n\r\n" not in data or len(data.partition(b"\r\n\r\n")[2]) < int(_field(data, b"Content-Length")):
            data += await stream.receive_some()
        assert data.startswith(b"POST /decide")
        assert _field(data, b"Content-Type") == b"application/json"
        self.questions.append(json.loads(data.partition(b"\r\n\r\n")[2]))
        if self.body is None:
            await stream.receive_some()
            return
        head = b"HTTP/1.0 %b\r\nContent-Length: %d\r\n\r\n" % (self.status, len(self.body))
        await stream.send_all(head + self.body)


def _field(data: bytes, name: bytes) -> bytes:
    return next(line[len(name) + 2 :] for line in data.split(b"\r\n") if line.startswith(name + b": "))


@pytest.fixture
async def asked(nursery: trio.Nursery) -> Service:
    service = Service()
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    await nursery.start(partial(trio.serve_listeners, service.handle, listeners))
    service.url = f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}/decide"
    return service


def authority(service: str, **keys: object) -> Authority:
    settings = ControlSettings.model_validate({"authorize": service, **keys})
    return Authority(lambda: settings)


async def failure(made: Authority, host: str) -> str:
    """The reason why a login is refused without an answer, which the log has and the user does not get."""
    with pytest.raises(AskFailedError) as error:
        await made.ask({"event": "login", "credential": "alice", "address": host}, "alice")
    with pytest.raises(LimitReachedError, match="the relay's authorization service gave no answer; try again later"):
        await made.check_login(ALICE, host)
    return str(error.value)


# Answers


async def test_a_login_is_asked_about_once_for_each_address(asked: Service) -> None:
    made = authority(asked.url)
    for host in ("192.0.2.7", "192.0.2.7", "192.0.2.8"):
        await made.check_login(ALICE, host)
    common = {"version": 1, "event": "login", "credential": "alice"}
    assert asked.questions == [{**common, "address": f"192.0.2.{number}"} for number in (7, 8)]


async def test_a_refusal_has_the_reason_of_the_service_without_what_a_terminal_obeys(asked: Service) -> None:
    reason = "not\x1b[2J\ntoday" + "x" * MAX_REASON
    asked.body = json.dumps({"allow": False, "reason": reason}).encode()
    with pytest.raises(NotAllowedError) as error:
        await authority(asked.url).check_login(ALICE, "192.0.2.7")
    shown = ("not[2Jtoday" + "x" * MAX_REASON)[:MAX_REASON]
    assert str(error.value) == f"the relay's authorization service refused this login: {shown}"


@pytest.mark.parametrize(("seconds", "questions"), [(59.0, 1), (60.0, 2)])
async def test_an_answer_is_remembered_for_authorize_cache(
    asked: Service, mock_clock: MockClock, seconds: float, questions: int
) -> None:
    asked.body = NO
    made = authority(asked.url, authorize_cache=60.0)
    for _ in range(2):
        with pytest.raises(NotAllowedError):
            await made.check_login(ALICE, "192.0.2.7")
        mock_clock.jump(seconds)
    assert len(asked.questions) == questions


async def test_admins_are_not_asked_about(asked: Service) -> None:
    asked.body = NO
    made = authority(asked.url)
    await made.check_login(ROOT, "192.0.2.7")
    await made.check_open(ROOT, "192.0.2.7", {})
    assert asked.questions == []


async def test_a_relay_without_credentials_asks_about_tunnels(asked: Service) -> None:
    asked.body = NO
    made = authority(asked.url)
    await made.check_login(EVERYBODY, "192.0.2.7")  # there is no login
    with pytest.raises(NotAllowedError, match="refused this open: not today"):
        await made.check_open(EVERYBODY, "192.0.2.7", {"name": "blog"})
    assert asked.questions[0]["tunnel"] == {"name": "blog"}


async def test_only_the_listed_events_are_asked_about(asked: Service) -> None:
    asked.body = NO
    await authority(asked.url, authorize_events=["open"]).check_login(ALICE, "192.0.2.7")
    await authority("").check_open(ALICE, "192.0.2.7", {})
    assert asked.questions == []


async def test_after_a_reload_with_another_service_its_answers_count(asked: Service) -> None:
    settings = ControlSettings.model_validate({"authorize": asked.url})
    made = Authority(lambda: settings)
    await made.check_login(ALICE, "192.0.2.7")
    asked.body = NO
    settings = ControlSettings.model_validate({"authorize": asked.url + "?new"})
    with pytest.raises(NotAllowedError):
        await made.check_login(ALICE, "192.0.2.7")


# Failures: nothing passes, and nothing is remembered


@pytest.mark.parametrize(
    "body",
    [b"", b"yes", b"[]", b"{}", b'{"allow": "yes"}', b'{"allow": 1}', b"[" * 100_000, b'{"allow": true}' * 2],
    ids=["empty", "no JSON", "a list", "empty object", "a string", "a number", "deep", "twice"],
)
async def test_what_is_no_answer_is_a_refusal(asked: Service, body: bytes) -> None:
    asked.body = body
    made = authority(asked.url)
    with pytest.raises(LimitReachedError, match="gave no answer; try again later"):
        await made.check_login(ALICE, "192.0.2.7")
    asked.body = YES
    await made.check_login(ALICE, "192.0.2.7")


async def test_a_status_other_than_200_is_a_refusal(asked: Service) -> None:
    asked.status = b"302 Found"
    assert re.search("answered with status 302", await failure(authority(asked.url), "192.0.2.7"))


async def test_a_service_that_cannot_be_reached_is_a_refusal() -> None:
    assert re.search("cannot be reached", await failure(authority("http://127.0.0.1:1/"), "192.0.2.7"))


async def test_a_service_that_hangs_is_given_up(asked: Service, autojump_clock: MockClock) -> None:
    asked.body = None
    start = trio.current_time()
    assert re.search(r"within 5 s \(control.authorize_timeout\)", await failure(authority(asked.url), "192.0.2.7"))
    assert trio.current_time() - start == pytest.approx(10.0, abs=0.1)  # asked twice


# Several at a time


async def test_equal_questions_are_asked_once_and_outlive_the_one_that_asked_first(
    asked: Service, nursery: trio.Nursery
) -> None:
    asked.body = None
    made = authority(asked.url)
    allowed = []

    async def ask(scope: trio.CancelScope) -> None:
        with scope:
            await made.check_login(ALICE, "192.0.2.7")
            allowed.append(scope)

    scopes = [trio.CancelScope() for _ in range(3)]
    for scope in scopes:
        nursery.start_soon(ask, scope)
        await wait_all_tasks_blocked()
    while not asked.questions:
        await trio.lowlevel.checkpoint()
    asked.body = YES
    scopes[0].cancel()
    while len(allowed) < 2:
        await trio.lowlevel.checkpoint()
    assert len(asked.questions) == 2


async def test_one_credential_has_its_share_of_the_open_questions(asked: Service, nursery: trio.Nursery) -> None:
    asked.body = None
    made = authority(asked.url, max_authorizing=4, credential_share=0.5)

    async def ask(host: str) -> None:
        with suppress(LimitReachedError):
            await made.check_login(ALICE, host)

    for number in range(2):
        nursery.start_soon(ask, f"192.0.2.{number}")
    while len(asked.questions) < 2:
        await trio.lowlevel.checkpoint()
    assert re.search("too many questions", await failure(made, "192.0.2.9"))
    asked.body = YES
    await made.check_login(Grant("bob"), "192.0.2.9")
    nursery.cancel_scope.cancel()


# Programs


def program(folder: Path, text: str) -> str:
    path = folder / "authorize"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


async def test_a_program_reads_the_question_and_answers(tmp_path: Path) -> None:
    made = authority(program(tmp_path, f"cat >{tmp_path}/question; echo '{NO.decode()}'"))
    with pytest.raises(NotAllowedError, match="not today"):
        await made.check_login(ALICE, "192.0.2.7")
    assert json.loads((tmp_path / "question").read_text())["credential"] == "alice"


async def test_a_program_may_answer_without_reading_the_question(tmp_path: Path) -> None:
    await authority(program(tmp_path, f"exec <&-; echo '{YES.decode()}'")).check_login(ALICE, "192.0.2.7")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (f"echo '{YES.decode()}'; exit 3", "failed with status 3"),
        ("true", "is no JSON"),
        (f"head -c {MAX_ANSWER + 1} /dev/zero", f"exceeds {MAX_ANSWER} bytes"),
    ],
)
async def test_a_program_that_fails_is_a_refusal(tmp_path: Path, text: str, reason: str) -> None:
    assert re.search(reason, await failure(authority(program(tmp_path, text)), "192.0.2.7"))


async def test_a_program_that_is_missing_is_a_refusal() -> None:
    assert re.search(
        r"could not run /nowhere/x \(control.authorize\): no such file",
        await failure(authority("/nowhere/x"), "192.0.2.7"),
    )


async def test_a_program_that_hangs_is_killed_with_what_it_has_started(tmp_path: Path) -> None:
    """Both hold the pipe open for as long as they run."""
    os.mkfifo(tmp_path / "pipe")
    made = authority(program(tmp_path, f"exec 3>{tmp_path}/pipe; sleep 1000 & echo started >&3; wait"))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(made.check_login, ALICE, "192.0.2.7")
        async with await trio.open_file(tmp_path / "pipe") as pipe:
            assert await pipe.readline() == "started\n"
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True):
                assert await pipe.read() == ""


@pytest.mark.parametrize(
    ("name", "reason"), [("blog", None), ("other", "your plan has no tunnel called 'other'")], ids=["yes", "no"]
)
async def test_the_example_works(name: str, reason: str | None) -> None:
    made = authority(str(EXAMPLE))
    if reason is None:
        await made.check_open(ALICE, "192.0.2.7", {"name": name})
        return
    with pytest.raises(NotAllowedError, match=reason):
        await made.check_open(ALICE, "192.0.2.7", {"name": name})


# Tunnels and visitors


Relay = Callable[..., Awaitable[TunnelService]]


@pytest.fixture
async def relay(nursery: trio.Nursery, engine: Engine, asked: Service) -> Relay:
    """Starts a relay that asks about tunnels and visitors."""

    async def start(**keys: object) -> TunnelService:
        control = ControlSettings.model_validate({"authorize": asked.url, "authorize_events": ["visitor"], **keys})
        settings = Settings(tunnels=TunnelSettings(ports="0"), control=control)
        service = TunnelService(lambda: settings, engine, BACKENDS)
        await nursery.start(service.run)
        return service

    return start


async def exchange(tunnel: Tunnel) -> bytes:
    """A visitor and its server; what the visitor gets."""
    async with await connect(tunnel.server_uri) as server, await connect(tunnel.client_uri) as visitor:
        await server.send_all(b"hello")
        return bytes(await visitor.receive_some(5))


async def test_a_tunnel_that_is_refused_is_not_opened(relay: Relay, asked: Service) -> None:
    asked.body = NO
    service = await relay(authorize_events=["open"])
    with pytest.raises(NotAllowedError):
        await service.open_tunnel("tcp", TunnelOptions(name="blog"), ME)
    assert not service.tunnels()
    assert asked.questions[0]["tunnel"] == {"backend": "tcp", "name": "blog", "port": None, "host": []}


async def test_a_visitor_waits_for_the_answer_and_the_next_one_does_not(relay: Relay, asked: Service) -> None:
    tunnel = await open_tunnel(await relay(), name="blog")
    assert [await exchange(tunnel) for _ in range(2)] == [b"hello", b"hello"]
    (question,) = asked.questions
    assert (question["event"], question["address"], question["tunnel"]["name"]) == ("visitor", "127.0.0.1", "blog")


@pytest.mark.parametrize("persist", ["yes", "no"])
async def test_a_visitor_that_is_refused_is_reset_and_ends_nothing(relay: Relay, asked: Service, persist: str) -> None:
    asked.body = NO
    tunnel = await open_tunnel(await relay(authorize_cache=0.0), persist=persist)
    for _ in range(2):
        assert await is_dropped(await connect(tunnel.client_uri))
    assert refused(tunnel) == {"denied": 2}
    asked.body = YES
    assert await exchange(tunnel) == b"hello"


async def test_a_visitor_that_was_refused_lately_is_refused_at_once(relay: Relay, asked: Service) -> None:
    asked.body = NO
    tunnel = await open_tunnel(await relay())
    for _ in range(2):
        assert await is_dropped(await connect(tunnel.client_uri))
    assert (len(asked.questions), refused(tunnel)) == (1, {"denied": 2})


async def test_a_visitor_that_leaves_takes_nothing_with_it(relay: Relay, asked: Service) -> None:
    asked.body = None
    tunnel = await open_tunnel(await relay())
    visitor = await connect(tunnel.client_uri)
    await until_waiting(tunnel, 1)
    reset(visitor)
    await visitor.aclose()
    await until_waiting(tunnel, 0)
    assert refused(tunnel) == {"unserved": 1}


async def test_a_failure_refuses_visitors(relay: Relay, asked: Service) -> None:
    asked.status = b"500 No"
    tunnel = await open_tunnel(await relay())
    assert await is_dropped(await connect(tunnel.client_uri))
    assert refused(tunnel) == {"denied": 1}


async def test_ask_tells_the_reason(asked: Service) -> None:
    asked.status = b"500 No"
    with pytest.raises(AskFailedError, match="the authorization service answered with status 500"):
        await authority(asked.url).ask({"event": "visitor", "address": "192.0.2.7"}, "alice")
