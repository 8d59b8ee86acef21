"""Limits and penalties for unauthenticated connections: the decision, and both on the control and HTTP ports.

Sources are addresses of 127.0.0.0/8, of which the tests exempt one instead of all.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.control.test_auth import log_in
from tests.http.support import running_http
from tests.support.control import LineClient, Server, running_server
from tests.support.credentials import credential
from tests.support.people import connect, is_dropped
from tunneld.auth.authenticator import REFUSALS_LOGGED, Authenticator
from tunneld.auth.preauth import PreauthCounts, PreauthLimiter, PreauthReason, PreauthRefusal, PreauthSlot, decide
from tunneld.config.schema import ControlSettings
from tunneld.config.values import Startups
from tunneld.net import sockets

LONG = 1e6
"""Seconds of a clock that the test moves by hand."""

ALICE = credential("alice")
HOME, FOE, FRIEND = "127.0.0.1", "127.0.0.2", "127.0.0.3"


def authenticator_with(settings: ControlSettings) -> Authenticator:
    """It asks for alice, and exempts HOME alone."""
    return Authenticator(lambda: (ALICE,), PreauthLimiter(lambda: settings, exempt=lambda host: host == HOME))


async def client_from(server: Server, source: str) -> LineClient:
    return LineClient(await connect(server.endpoint, source))


async def greeting(server: Server, source: str) -> str:
    """The first line that somebody from there hears, who then leaves and is gone for the server."""
    client = await client_from(server, source)
    line = await client.read_line()
    await client.stream.aclose()
    await wait_all_tasks_blocked(0.005)
    return line


async def fail_from(server: Server, source: str, times: int = 1) -> None:
    client = await client_from(server, source)
    await client.read_line()
    for _ in range(times):
        assert (await log_in(client, secret="wrong")).startswith("ERR not-allowed")
    await client.stream.aclose()


# The decision


@pytest.mark.parametrize(
    ("facts", "die", "kind"),
    [
        (PreauthCounts(0, 0, 0.0), 0.0, None),
        (PreauthCounts(9, 3, 0.0), 0.0, None),
        (PreauthCounts(10, 3, 0.0), 0.299, PreauthReason.STARTUPS),
        (PreauthCounts(10, 3, 0.0), 0.3, None),
        (PreauthCounts(20, 0, 0.0), 0.649, PreauthReason.STARTUPS),
        (PreauthCounts(20, 0, 0.0), 0.65, None),
        (PreauthCounts(30, 0, 0.0), 0.999999, PreauthReason.STARTUPS),
        (PreauthCounts(9, 4, 0.0), 0.999999, PreauthReason.PER_SOURCE),
        (PreauthCounts(30, 4, 0.001), 0.0, PreauthReason.PENALTY),
        (PreauthCounts(30, 4, 0.0), 0.0, PreauthReason.PER_SOURCE),
    ],
)
def test_decisions(facts: PreauthCounts, die: float, kind: PreauthReason | None) -> None:
    refusal = decide(facts, Startups(10, 30, 30), 4, die)
    assert (refusal.kind if refusal else None) == kind


COUNTS = st.integers(1, 1000)
STARTUPS = st.tuples(COUNTS, st.integers(1, 100), COUNTS).map(
    lambda three: Startups(min(three[0], three[2]), three[1], max(three[0], three[2]))
)
DICE = st.floats(0, 1, exclude_max=True)


@given(STARTUPS, st.integers(0, 1100), DICE)
def test_whoever_is_alone_comes_in_and_at_full_nobody(startups: Startups, strangers: int, die: float) -> None:
    refused = decide(PreauthCounts(strangers, 0, 0.0), startups, 1, die) is not None
    assert refused <= (strangers >= startups.start)
    assert refused >= (strangers >= startups.full)


@given(STARTUPS, st.integers(0, 1100))
def test_more_strangers_make_it_no_likelier_to_come_in(startups: Startups, strangers: int) -> None:
    assert 0 <= startups.odds(strangers) <= startups.odds(strangers + 1) <= 1


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans(), DICE), max_size=200))
def test_who_came_is_counted_until_it_ends_once(steps: list[tuple[int, bool, float]]) -> None:
    settings = ControlSettings(max_startups="4:50:8", max_startups_per_source=3)
    strangers = PreauthLimiter(lambda: settings)
    here: list[tuple[int, PreauthSlot]] = []
    for source, leaves, die in steps:
        if leaves and here:
            _, gone = here.pop(random.Random(die).randrange(len(here)))
            gone.release()
            gone.release()
        elif isinstance(came := strangers.acquire(f"192.0.2.{source}", 0.0, die), PreauthSlot):
            here.append((source, came))
        assert len(strangers) == len(here) <= 8
        assert all(sum(one == other for other, _ in here) <= 3 for one, _ in here)
        assert strangers._by_source.total() == len(here)
        assert all(strangers._by_source.values())  # who is gone takes no memory


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "::ffff:127.0.0.1"])
def test_loopback_counts_but_has_no_cap_of_its_own_and_no_penalty(host: str) -> None:
    settings = ControlSettings(max_startups="3:100:3", max_startups_per_source=1)
    strangers = PreauthLimiter(lambda: settings)
    for _ in range(10):
        strangers.fail(host, 0.0)
    came = [strangers.acquire(host, 0.0, 0.0) for _ in range(4)]
    assert [isinstance(one, PreauthSlot) for one in came] == [True, True, True, False]
    assert strangers.refusals == {PreauthReason.STARTUPS: 1}


def test_a_whole_ipv6_network_of_64_bits_is_one_source() -> None:
    settings = ControlSettings(max_startups_per_source=1)
    strangers = PreauthLimiter(lambda: settings)
    assert isinstance(strangers.acquire("2001:db8::1", 0.0, 0.0), PreauthSlot)
    assert isinstance(strangers.acquire("2001:db8::2", 0.0, 0.0), PreauthRefusal)
    assert isinstance(strangers.acquire("2001:db8:0:1::1", 0.0, 0.0), PreauthSlot)


# On the line relay


async def test_over_max_startups_newcomers_are_told_and_leave_a_place_when_known() -> None:
    settings = ControlSettings(max_startups="2:100:2")
    async with running_server(settings, authenticator=authenticator_with(settings)) as server:
        async with server.client() as one, server.client():
            refused = await client_from(server, HOME)
            assert await refused.read_all() == [
                "ERR limit 2 connections have not authenticated yet (control.max_startups); try again later"
            ]
            assert (await log_in(one)).startswith("OK")
            assert (await greeting(server, HOME)).startswith("OK tunneld")
            assert await one.request("echo hi") == "OK hi"
        await wait_all_tasks_blocked(0.005)
        async with server.client(), server.client():
            pass


async def test_one_source_cannot_have_every_place() -> None:
    settings = ControlSettings(max_startups_per_source=2)
    async with running_server(settings, authenticator=authenticator_with(settings)) as server:
        people = [await client_from(server, FOE) for _ in range(2)]
        assert all([(await client.read_line()).startswith("OK") for client in people])
        assert (await greeting(server, FOE)).startswith("ERR limit 2 connections from your address")
        assert (await greeting(server, FRIEND)).startswith("OK tunneld")
        assert (await log_in(people[0])).startswith("OK")
        assert (await greeting(server, FOE)).startswith("OK tunneld")


async def test_where_nobody_is_asked_nobody_is_a_stranger() -> None:
    settings = ControlSettings(max_startups="1:100:1", max_startups_per_source=1)
    authenticator = Authenticator(lambda: (), PreauthLimiter(lambda: settings))
    async with (
        running_server(settings, authenticator=authenticator) as server,
        server.client(),
        server.client(),
        server.client(),
    ):
        assert await server.is_serving()


async def test_a_refused_stranger_costs_no_descriptor() -> None:
    settings = ControlSettings(max_startups="1:100:1")
    async with running_server(settings, authenticator=authenticator_with(settings)) as server, server.client():
        before = sockets.open_descriptors()
        for _ in range(20):
            assert (await greeting(server, HOME)).startswith("ERR limit")
        assert sockets.open_descriptors() == before


async def test_a_flood_does_not_flood_the_log(mock_clock: MockClock) -> None:
    settings = ControlSettings(max_startups="1:100:1")
    async with (
        running_server(settings, patience=LONG, authenticator=authenticator_with(settings)) as server,
        server.client(),
    ):
        with capture_logs() as logs:
            for _ in range(30):
                await greeting(server, HOME)
            mock_clock.jump(9)  # the stranger in the only place has 10 s
            await greeting(server, HOME)
        told = [log for log in logs if log["event"] == "unauthenticated connection refused"]
        assert len(told) == REFUSALS_LOGGED.count + 1
        assert [log["left_out"] for log in told[-2:]] == [0, 30 - REFUSALS_LOGGED.count]
        assert told[0]["peer"] == HOME


async def test_who_failed_too_often_is_refused_for_a_time_and_nobody_else(mock_clock: MockClock) -> None:
    settings = ControlSettings(penalty=5.0)
    async with running_server(settings, patience=LONG, authenticator=authenticator_with(settings)) as server:
        known = await client_from(server, FOE)
        await known.read_line()
        assert (await log_in(known)).startswith("OK")
        await fail_from(server, FOE, 2)
        assert (await greeting(server, FOE)).startswith("OK")
        await fail_from(server, FOE)
        assert await greeting(server, FOE) == "ERR limit too many failed logins from your address; try again in 5 s"
        assert (await greeting(server, FRIEND)).startswith("OK")
        assert await known.request("echo hi") == "OK hi"
        mock_clock.jump(4.9)
        assert (await greeting(server, FOE)).startswith("ERR limit")
        mock_clock.jump(0.1)
        await fail_from(server, FOE)
        assert await greeting(server, FOE) == "ERR limit too many failed logins from your address; try again in 10 s"


async def test_connections_that_are_open_already_are_no_further_guesses(mock_clock: MockClock) -> None:
    settings = ControlSettings()
    async with running_server(settings, patience=LONG, authenticator=authenticator_with(settings)) as server:
        second = await client_from(server, FOE)
        await second.read_line()
        await fail_from(server, FOE, 3)
        hello = "auth SCRAM-SHA-256 biwsbj1hbGljZSxyPWFiYw=="
        assert await second.request(hello) == "ERR limit too many failed logins from your address; try again in 5 s"
        mock_clock.jump(5)
        assert (await log_in(second)).startswith("OK")


async def test_who_takes_a_place_and_says_nothing_has_failed_but_a_probe_has_not(mock_clock: MockClock) -> None:
    settings = ControlSettings(handshake_timeout=10.0)
    authenticator = authenticator_with(settings)
    async with running_server(settings, patience=LONG, authenticator=authenticator) as server:
        silent = [await client_from(server, FOE) for _ in range(3)]
        probes = [await client_from(server, FRIEND) for _ in range(5)]
        for client in silent + probes:
            await client.read_line()
        for client in probes:
            await client.stream.aclose()
        await wait_all_tasks_blocked(0.005)
        mock_clock.jump(11)
        for client in silent:
            assert (await client.read_line()).startswith("ERR limit authentication timed out")
            await client.stream.aclose()
        await wait_all_tasks_blocked(0.005)
        assert (authenticator.penalty(FOE), authenticator.penalty(FRIEND)) == (5.0, 0.0)
        assert len(authenticator.preauth) == 0


# Both faces


async def test_a_penalty_of_one_face_holds_on_the_other(mock_clock: MockClock) -> None:
    settings = ControlSettings()
    strangers = PreauthLimiter(lambda: settings, exempt=lambda _: False)
    authenticator = Authenticator(lambda: (ALICE,), strangers)
    async with (
        running_server(settings, patience=LONG, authenticator=authenticator) as server,
        running_http(authenticator=authenticator) as relay,
    ):
        assert (await relay.request("GET", "/healthz")).status == 200
        for number in range(3):
            answer = await relay.request("GET", "/api/v1/list", authorization=f"Bearer {number}")
            assert answer.status == 401
        async with await relay.connect() as stream:
            assert await is_dropped(stream)
        assert (await greeting(server, HOME)).startswith("ERR limit too many failed logins")
        assert strangers.refusals == {PreauthReason.PENALTY: 2}
        mock_clock.jump(5)
        assert (await relay.request("GET", "/healthz")).status == 200
