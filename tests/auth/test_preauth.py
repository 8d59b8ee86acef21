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

from tests.control.test_login import log_in
from tests.http.support import running_http
from tests.support.control import LineClient, Server, running_server
from tests.support.credentials import credential
from tests.support.peers import connect, is_dropped
from tunneld.auth.authenticator import PREAUTH_LOG_RATE, Authenticator
from tunneld.auth.preauth import PreauthCounts, PreauthLimiter, PreauthReason, PreauthRefusal, PreauthSlot, decide
from tunneld.config.schema import ControlSettings
from tunneld.config.values import Startups
from tunneld.net import sockets
from tunneld.net.endpoint import parse_network
from tunneld.policy.bans import Bans
from tunneld.wire import scram

LONG = 1e6
"""Timeout of a test in seconds of a mock clock, which the test advances by hand."""

ALICE = credential("alice")
EXEMPT, ATTACKER, OTHER = "127.0.0.1", "127.0.0.2", "127.0.0.3"


def authenticator_with(settings: ControlSettings) -> Authenticator:
    """An authenticator with the credential alice that exempts only EXEMPT."""
    return Authenticator(lambda: (ALICE,), PreauthLimiter(lambda: settings, exempt=lambda host: host == EXEMPT))


async def client_from(server: Server, source: str) -> LineClient:
    return LineClient(await connect(server.endpoint, source))


async def greeting(server: Server, source: str) -> str:
    """The first line that a new connection from `source` receives; then it closes, and the server has noticed."""
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


async def fail_as(server: Server, source: str, *names: str) -> None:
    """Fail a login for each name, on connections of their own."""
    for name in names:
        client = await client_from(server, source)
        await client.read_line()
        assert (await log_in(client, name, "wrong")).startswith("ERR not-allowed")
        await client.stream.aclose()
        await wait_all_tasks_blocked(0.005)


def first_step(name: str) -> str:
    return f"auth SCRAM-SHA-256 {scram.encode(f'n,,n={name},r=abc'.encode())}"


# The decision


@pytest.mark.parametrize(
    ("counts", "random_number", "kind"),
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
def test_decisions(counts: PreauthCounts, random_number: float, kind: PreauthReason | None) -> None:
    refusal = decide(counts, Startups(10, 30, 30), 4, random_number)
    assert (refusal.kind if refusal else None) == kind


COUNTS = st.integers(1, 1000)
STARTUPS = st.tuples(COUNTS, st.integers(1, 100), COUNTS).map(
    lambda three: Startups(min(three[0], three[2]), three[1], max(three[0], three[2]))
)
RANDOM_NUMBERS = st.floats(0, 1, exclude_max=True)


@given(STARTUPS, st.integers(0, 1100), RANDOM_NUMBERS)
def test_none_is_refused_below_start_and_all_at_full(
    startups: Startups, unauthenticated: int, random_number: float
) -> None:
    refused = decide(PreauthCounts(unauthenticated, 0, 0.0), startups, 1, random_number) is not None
    assert refused <= (unauthenticated >= startups.start)
    assert refused >= (unauthenticated >= startups.full)


@given(STARTUPS, st.integers(0, 1100))
def test_more_connections_never_lower_the_odds(startups: Startups, unauthenticated: int) -> None:
    assert 0 <= startups.odds(unauthenticated) <= startups.odds(unauthenticated + 1) <= 1


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans(), RANDOM_NUMBERS), max_size=200))
def test_a_slot_is_counted_until_it_is_released_once(steps: list[tuple[int, bool, float]]) -> None:
    settings = ControlSettings(max_startups="4:50:8", max_startups_per_source=3)
    limiter = PreauthLimiter(lambda: settings)
    here: list[tuple[int, PreauthSlot]] = []
    for source, leaves, random_number in steps:
        if leaves and here:
            _, gone = here.pop(random.Random(random_number).randrange(len(here)))
            gone.release()
            gone.release()
        elif isinstance(came := limiter.acquire(f"192.0.2.{source}", 0.0, random_number), PreauthSlot):
            here.append((source, came))
        assert len(limiter) == len(here) <= 8
        assert all(sum(one == other for other, _ in here) <= 3 for one, _ in here)
        assert limiter.by_source.total() == len(here)
        assert all(limiter.by_source.values())  # a released slot takes no memory


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "::ffff:127.0.0.1"])
def test_loopback_counts_but_has_no_limit_of_its_own_and_no_penalty(host: str) -> None:
    settings = ControlSettings(max_startups="3:100:3", max_startups_per_source=1)
    limiter = PreauthLimiter(lambda: settings)
    for _ in range(10):
        limiter.fail(host, 0.0)
    came = [limiter.acquire(host, 0.0, 0.0) for _ in range(4)]
    assert [isinstance(one, PreauthSlot) for one in came] == [True, True, True, False]
    assert limiter.refusals == {PreauthReason.STARTUPS: 1}


def test_banned_networks_are_refused_but_never_this_machine() -> None:
    bans = Bans()
    limiter = PreauthLimiter(ControlSettings, bans=bans)
    for network in ("192.0.2.0/24", "127.0.0.0/8"):
        bans.add(parse_network(network), 10.0)
    refusal = limiter.acquire("192.0.2.7", 0.0, 0.0)
    assert isinstance(refusal, PreauthRefusal)
    assert refusal.kind is PreauthReason.BANNED
    assert limiter.refuse_penalised("192.0.2.7", 0.0) == refusal
    assert isinstance(limiter.acquire("127.0.0.1", 0.0, 0.0), PreauthSlot)
    assert isinstance(limiter.acquire("192.0.2.7", 10.0, 0.0), PreauthSlot)
    assert (limiter.refusals, len(limiter)) == ({PreauthReason.BANNED: 2}, 2)


def test_an_ipv6_network_of_64_bits_is_one_source() -> None:
    settings = ControlSettings(max_startups_per_source=1)
    limiter = PreauthLimiter(lambda: settings)
    assert isinstance(limiter.acquire("2001:db8::1", 0.0, 0.0), PreauthSlot)
    assert isinstance(limiter.acquire("2001:db8::2", 0.0, 0.0), PreauthRefusal)
    assert isinstance(limiter.acquire("2001:db8:0:1::1", 0.0, 0.0), PreauthSlot)


# On the control port


async def test_over_max_startups_connections_are_refused_until_one_authenticates() -> None:
    settings = ControlSettings(max_startups="2:100:2")
    async with running_server(settings, authenticator=authenticator_with(settings)) as server:
        async with server.client() as one, server.client():
            refused = await client_from(server, EXEMPT)
            assert await refused.read_all() == [
                "ERR limit 2 connections have not authenticated yet (control.max_startups); try again later"
            ]
            assert (await log_in(one)).startswith("OK")
            assert (await greeting(server, EXEMPT)).startswith("OK tunneld")
            assert await one.request("echo hi") == "OK hi"
        await wait_all_tasks_blocked(0.005)
        async with server.client(), server.client():
            pass


async def test_one_source_cannot_take_every_place() -> None:
    settings = ControlSettings(max_startups_per_source=2)
    async with running_server(settings, authenticator=authenticator_with(settings)) as server:
        clients = [await client_from(server, ATTACKER) for _ in range(2)]
        assert all([(await client.read_line()).startswith("OK") for client in clients])
        assert (await greeting(server, ATTACKER)).startswith("ERR limit 2 connections from your address")
        assert (await greeting(server, OTHER)).startswith("OK tunneld")
        assert (await log_in(clients[0])).startswith("OK")
        assert (await greeting(server, ATTACKER)).startswith("OK tunneld")


async def test_without_credentials_no_place_is_needed() -> None:
    settings = ControlSettings(max_startups="1:100:1", max_startups_per_source=1)
    authenticator = Authenticator(lambda: (), PreauthLimiter(lambda: settings))
    async with (
        running_server(settings, authenticator=authenticator) as server,
        server.client(),
        server.client(),
        server.client(),
    ):
        assert await server.is_serving()


async def test_a_refused_connection_costs_no_descriptor() -> None:
    settings = ControlSettings(max_startups="1:100:1")
    async with running_server(settings, authenticator=authenticator_with(settings)) as server, server.client():
        before = sockets.open_descriptors()
        for _ in range(20):
            assert (await greeting(server, EXEMPT)).startswith("ERR limit")
        assert sockets.open_descriptors() == before


async def test_a_flood_does_not_flood_the_log(mock_clock: MockClock) -> None:
    settings = ControlSettings(max_startups="1:100:1")
    async with (
        running_server(settings, timeout=LONG, authenticator=authenticator_with(settings)) as server,
        server.client(),
    ):
        with capture_logs() as logs:
            for _ in range(30):
                await greeting(server, EXEMPT)
            mock_clock.jump(9)  # the connection in the only place has 10 s
            await greeting(server, EXEMPT)
        refusals = [log for log in logs if log["event"] == "unauthenticated connection refused"]
        assert len(refusals) == PREAUTH_LOG_RATE.count + 1
        assert [log["left_out"] for log in refusals[-2:]] == [0, 30 - PREAUTH_LOG_RATE.count]
        assert refusals[0]["peer"] == EXEMPT


NAMES = ("bob", "carol", "dave")
"""As many names as it takes to block an address."""


def blocked(seconds: int) -> str:
    return f"ERR limit this address is blocked for {seconds} s after failed logins from it"


def name_blocked(seconds: int) -> str:
    return f"ERR limit this name is blocked for {seconds} s after failed logins with it from this address"


async def test_a_source_that_tried_too_many_names_is_refused_for_a_time(mock_clock: MockClock) -> None:
    settings = ControlSettings(penalty=5.0)
    async with running_server(settings, timeout=LONG, authenticator=authenticator_with(settings)) as server:
        await fail_as(server, ATTACKER, *NAMES[:2])
        assert (await greeting(server, ATTACKER)).startswith("OK")
        await fail_as(server, ATTACKER, NAMES[2])
        assert await greeting(server, ATTACKER) == blocked(5)
        assert (await greeting(server, OTHER)).startswith("OK")
        mock_clock.jump(4.9)
        assert (await greeting(server, ATTACKER)).startswith("ERR limit")
        mock_clock.jump(0.1)
        await fail_as(server, ATTACKER, "eve")
        assert await greeting(server, ATTACKER) == blocked(10)


async def test_one_device_with_a_wrong_secret_blocks_its_name_and_not_its_address(mock_clock: MockClock) -> None:
    settings = ControlSettings()
    async with running_server(settings, timeout=LONG, authenticator=authenticator_with(settings)) as server:
        await fail_as(server, ATTACKER, "bob", "bob", "bob")
        client = await client_from(server, ATTACKER)
        await client.read_line()
        assert await client.request(first_step("bob")) == name_blocked(5)
        for penalty in (5, 10, 20, 40):
            mock_clock.jump(penalty)
            await fail_as(server, ATTACKER, "bob")
        neighbour = await client_from(server, ATTACKER)
        await neighbour.read_line()
        assert (await log_in(neighbour)).startswith("OK")
        assert (await greeting(server, ATTACKER)).startswith("OK")


async def test_open_connections_allow_no_further_guesses(mock_clock: MockClock) -> None:
    settings = ControlSettings()
    async with running_server(settings, timeout=LONG, authenticator=authenticator_with(settings)) as server:
        second = await client_from(server, ATTACKER)
        await second.read_line()
        await fail_from(server, ATTACKER, 3)
        assert await second.request(first_step("alice")) == name_blocked(5)
        mock_clock.jump(5)
        assert (await log_in(second)).startswith("OK")


async def test_a_challenge_from_before_a_penalty_allows_no_guess() -> None:
    settings = ControlSettings()
    async with running_server(settings, authenticator=authenticator_with(settings)) as server:
        second = await client_from(server, ATTACKER)
        await second.read_line()
        assert (await second.request(first_step("alice"))).startswith("OK")
        await fail_from(server, ATTACKER, 3)
        assert await second.request("auth biws") == name_blocked(5)


async def test_a_blocked_address_keeps_places_for_a_credential_that_logged_in_there(mock_clock: MockClock) -> None:
    settings = ControlSettings(kept_places=2, known_address_time=500.0)
    authenticator = authenticator_with(settings)
    async with running_server(settings, timeout=LONG, authenticator=authenticator) as server:
        agent = await client_from(server, ATTACKER)
        await agent.read_line()
        assert (await log_in(agent)).startswith("OK")
        await fail_as(server, ATTACKER, *NAMES)
        assert await agent.request("echo hi") == "OK hi"
        attacker, again = await client_from(server, ATTACKER), await client_from(server, ATTACKER)
        assert [(await each.read_line())[:2] for each in (attacker, again)] == ["OK", "OK"]
        assert await greeting(server, ATTACKER) == blocked(5)
        assert await attacker.request(first_step("eve")) == blocked(5)
        assert (await log_in(again)).startswith("OK")
        for client in (attacker, agent, again):
            await client.stream.aclose()
        await wait_all_tasks_blocked(0.005)
        mock_clock.jump(500)  # the penalty is over, the failures are not forgiven
        await fail_as(server, ATTACKER, "mallory")
        assert await greeting(server, ATTACKER) == blocked(10)


async def test_a_replaced_secret_does_not_block_the_office_whose_agents_have_the_old_one() -> None:
    """Each agent is blocked by its own failures alone, and logs in once it has the new secret."""
    names = [f"agent{number}" for number in range(12)]
    now = [credential(name) for name in names]
    settings = ControlSettings()
    limiter = PreauthLimiter(lambda: settings, exempt=lambda host: host == EXEMPT)
    async with running_server(settings, authenticator=Authenticator(lambda: now, limiter)) as server:
        for name in names:
            client = await client_from(server, ATTACKER)
            await client.read_line()
            assert (await log_in(client, name)).startswith("OK")
            await client.stream.aclose()
        now[:] = [credential(name, "the new secret") for name in names]
        await fail_as(server, ATTACKER, *names)
        for name in names:
            client = await client_from(server, ATTACKER)
            await client.read_line()
            assert (await log_in(client, name, "the new secret")).startswith("OK")
            await client.stream.aclose()


async def test_trusted_networks_have_no_penalty_and_no_limit_per_source() -> None:
    settings = ControlSettings(trusted_networks=("127.0.0.2/32",), max_startups_per_source=1)
    async with running_server(settings, authenticator=authenticator_with(settings)) as server:
        await fail_as(server, ATTACKER, *NAMES, "eve")
        clients = [await client_from(server, ATTACKER) for _ in range(2)]
        assert all([(await client.read_line()).startswith("OK") for client in clients])
        await fail_as(server, OTHER, *NAMES)
        assert (await greeting(server, OTHER)).startswith("ERR limit")


async def test_a_first_step_must_be_answered_before_the_next() -> None:
    """Else one connection could ask for the challenges of any number of names, and no failure would be counted."""
    settings = ControlSettings()
    async with running_server(settings, authenticator=authenticator_with(settings)) as server:
        client = await client_from(server, ATTACKER)
        await client.read_line()
        for name in NAMES:
            assert (await client.request(first_step(name))).startswith("OK")
            assert await client.request(first_step("next")) == "ERR usage the challenge before this was not answered"
        assert await client.read_all() == []
        assert await greeting(server, ATTACKER) == blocked(5)


async def test_logins_that_are_left_unfinished_count_as_abandoned_and_probes_do_not() -> None:
    settings = ControlSettings(abandoned_handshakes="5/h")
    authenticator = authenticator_with(settings)
    async with running_server(settings, authenticator=authenticator) as server:
        for _ in range(20):
            assert (await greeting(server, ATTACKER)).startswith("OK")
        for _ in range(8):
            assert authenticator.penalty(ATTACKER) == 0.0
            client = await client_from(server, ATTACKER)
            await client.read_line()
            assert (await client.request(first_step("alice"))).startswith("OK")
            await client.stream.aclose()
            await wait_all_tasks_blocked(0.005)
        assert authenticator.penalty(ATTACKER) > 0.0


async def test_silence_until_the_deadline_is_a_failure_but_a_probe_is_none(mock_clock: MockClock) -> None:
    settings = ControlSettings(handshake_timeout=10.0)
    authenticator = authenticator_with(settings)
    async with running_server(settings, timeout=LONG, authenticator=authenticator) as server:
        silent = [await client_from(server, ATTACKER) for _ in range(3)]
        probes = [await client_from(server, OTHER) for _ in range(5)]
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
        assert (authenticator.penalty(ATTACKER), authenticator.penalty(OTHER)) == (5.0, 0.0)
        assert len(authenticator.preauth) == 0


# Both ports


async def test_a_penalty_of_one_port_holds_on_the_other(mock_clock: MockClock) -> None:
    settings = ControlSettings()
    limiter = PreauthLimiter(lambda: settings, exempt=lambda _: False)
    authenticator = Authenticator(lambda: (ALICE,), limiter)
    async with (
        running_server(settings, timeout=LONG, authenticator=authenticator) as server,
        running_http(authenticator=authenticator) as relay,
    ):
        assert (await relay.request("GET", "/healthz")).status == 200
        for number in range(3):
            answer = await relay.request("GET", "/api/v1/list", authorization=f"Bearer {number}")
            assert answer.status == 401
        async with await relay.connect() as stream:
            assert await is_dropped(stream)
        assert (await greeting(server, EXEMPT)) == blocked(5)
        assert limiter.refusals == {PreauthReason.PENALTY: 2}
        mock_clock.jump(5)
        assert (await relay.request("GET", "/healthz")).status == 200
