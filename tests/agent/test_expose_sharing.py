"""Several agents serve one tunnel: they share its visitors, join and leave, and the last one closes it."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import pytest
import trio

from tests.agent.support import (
    NEEDED,
    PATIENCE,
    Handler,
    RecordingReporter,
    RelayHere,
    agent,
    echo,
    local_server,
    relay_here,
)
from tests.agent.test_expose import address
from tests.support.peers import connect, is_dropped, is_refused, read_all, read_exactly
from tunneld.agent import backoff
from tunneld.agent.expose import Exposure
from tunneld.agent.health import Check, UnhealthyPolicy
from tunneld.agent.request import TunnelRequest
from tunneld.errors import RefusedError
from tunneld.net.endpoint import Target
from tunneld.wire.lines import Value

pytestmark = pytest.mark.usefixtures("each_backend")
PARKED_PER_AGENT = {"tcp": 8, "webmux": 126, "egtp": 10_000}
"""What one agent adds to `Tunnel.parked`: parked connections, or places on its carrier."""
SHARED: Mapping[str, Value] = {"name": "web", "share": True}


@pytest.fixture(autouse=True)
def _short_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backoff, "FIRST_DELAY", 0.01)
    monkeypatch.setattr(backoff, "MAX_DELAY", 0.02)


def replying(word: bytes) -> Handler:
    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.send_all(word)

    return serve


@asynccontextmanager
async def running_agent(
    target: Target, relay: RelayHere, reporter: RecordingReporter, request: TunnelRequest
) -> AsyncIterator[Exposure]:
    """An agent that may end before the block does."""
    async with trio.open_nursery() as nursery:
        exposure = await nursery.start(run_agent, target, relay, reporter, request)
        await reporter.wait_for("opened")
        yield exposure
        nursery.cancel_scope.cancel()


async def run_agent(
    target: Target,
    relay: RelayHere,
    reporter: RecordingReporter,
    request: TunnelRequest,
    *,
    task_status: trio.TaskStatus[Exposure],
) -> None:
    async with agent(target, relay.access, reporter, request) as exposure:
        task_status.started(exposure)
        await exposure.run()


@asynccontextmanager
async def sharing_agent(
    relay: RelayHere, handler: Handler, reporter: RecordingReporter, **more: Value
) -> AsyncIterator[Exposure]:
    async with (
        local_server(handler) as target,
        running_agent(target, relay, reporter, TunnelRequest({**SHARED, **more})) as exposure,
    ):
        yield exposure


async def until_agents(relay: RelayHere, count: int) -> None:
    while len(relay.tunnel.agents) != count:
        await trio.lowlevel.checkpoint()


async def until_ready(relay: RelayHere, *exposures: Exposure) -> None:
    """Wait until each exposure has its connections at the relay."""
    while not all(exposure.stats.parked for exposure in exposures):
        await trio.lowlevel.checkpoint()
    while relay.tunnel.parked < len(exposures):
        await trio.lowlevel.checkpoint()


async def answers_of(reporter: RecordingReporter, count: int) -> Counter[bytes]:
    """What `count` simultaneous visitors receive."""
    streams = [await connect(address(reporter)) for _ in range(count)]
    answers = Counter([await read_all(stream) for stream in streams])
    for stream in streams:
        await stream.aclose()
    return answers


async def test_two_agents_have_one_address_and_share_its_visitors() -> None:
    one, two = RecordingReporter(), RecordingReporter()
    with trio.fail_after(PATIENCE):
        async with (
            relay_here() as relay,
            sharing_agent(relay, replying(b"one"), one) as first,
            sharing_agent(relay, replying(b"two"), two) as second,
        ):
            assert address(one) == address(two)
            assert one.all("opened")[0]["uri"] == two.all("opened")[0]["uri"]
            await until_ready(relay, first, second)
            async with relay.access.connect() as client:
                assert (await client.show(relay.tunnel.id))[0]["agents"] == 2
            answers = await answers_of(one, 40)
            assert set(answers) == {b"one", b"two"}


async def test_an_agent_that_ends_leaves_the_tunnel_to_the_other_and_the_last_one_closes_it() -> None:
    one, two = RecordingReporter(), RecordingReporter()
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay:
            async with (
                sharing_agent(relay, replying(b"one"), one) as first,
                sharing_agent(relay, replying(b"two"), two) as second,
            ):
                await until_ready(relay, first, second)
                first.drain("told to stop", PATIENCE)
                await one.wait_for("closed")
                assert len(relay.tunnel.agents) == 1
                assert set(await answers_of(two, 20)) == {b"two"}
                tunnel = relay.tunnel
                second.drain("told to stop", PATIENCE)
                await two.wait_for("closed")
                await tunnel.wait_closed()
            assert await is_refused(address(two))
            (kept,) = relay.service.reservations.table
            assert kept.client_port == address(one).port
            assert kept.expires is not None


async def test_an_agent_that_was_killed_leaves_the_tunnel_to_the_other_too() -> None:
    one, two = RecordingReporter(), RecordingReporter()
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay, sharing_agent(relay, replying(b"two"), two) as second:
            async with sharing_agent(relay, replying(b"one"), one) as first:
                await until_ready(relay, first, second)
            await until_agents(relay, 1)
            assert set(await answers_of(two, 10)) == {b"two"}


async def test_a_visitor_of_an_agent_that_ends_finishes_and_no_new_one_goes_there() -> None:
    one, two = RecordingReporter(), RecordingReporter()
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay, sharing_agent(relay, echo, one) as first:
            await until_ready(relay, first)
            stream = await connect(address(one))
            await stream.send_all(b"before")
            assert await read_exactly(stream, 6) == b"before"
            async with sharing_agent(relay, replying(b"two"), two) as second:
                await until_ready(relay, first, second)
                first.drain("told to stop", PATIENCE)
                assert (await one.wait_for("draining"))["visitors"] == 1
                assert set(await answers_of(two, 20)) == {b"two"}
                await stream.send_all(b"after")
                assert await read_exactly(stream, 5) == b"after"
                await stream.send_eof()
                assert await read_all(stream) == b""
                await one.wait_for("closed")


async def test_a_visitor_of_a_tunnel_that_is_not_shared_finishes_too_and_new_ones_are_refused() -> None:
    reporter = RecordingReporter()
    with trio.fail_after(PATIENCE):
        async with (
            relay_here() as relay,
            local_server(echo) as target,
            running_agent(target, relay, reporter, TunnelRequest()) as exposure,
        ):
            stream = await connect(address(reporter))
            await stream.send_all(b"before")
            assert await read_exactly(stream, 6) == b"before"
            exposure.drain("told to stop", PATIENCE)
            await reporter.wait_for("draining")
            assert await is_refused(address(reporter))
            await stream.send_all(b"after")
            assert await read_exactly(stream, 5) == b"after"
            await stream.aclose()
            await reporter.wait_for("closed")
            while relay.service.tunnels():
                await trio.lowlevel.checkpoint()


async def test_an_agent_with_an_unhealthy_local_server_leaves_visitors_to_the_other_agents() -> None:
    one, two, check = RecordingReporter(), RecordingReporter(), Check("tcp", policy=UnhealthyPolicy.WITHDRAW)
    with trio.fail_after(PATIENCE):
        async with (
            relay_here() as relay,
            sharing_agent(relay, replying(b"one"), one) as first,
            sharing_agent(relay, replying(b"two"), two) as second,
        ):
            await until_ready(relay, first, second)
            first.on_health(check, healthy=False)
            while first.stats.parked or relay.tunnel.parked > PARKED_PER_AGENT[relay.tunnel.spec.backend]:
                await trio.lowlevel.checkpoint()
            assert set(await answers_of(two, 20)) == {b"two"}
            first.on_health(check, healthy=True)
            await until_ready(relay, first, second)
            answers = set[bytes]()
            while answers != {b"one", b"two"}:
                answers |= set(await answers_of(two, 10))


async def test_a_visitor_that_does_not_finish_in_time_is_dropped() -> None:
    reporter = RecordingReporter()
    with trio.fail_after(PATIENCE):
        async with (
            relay_here() as relay,
            local_server(echo) as target,
            running_agent(target, relay, reporter, TunnelRequest()) as exposure,
        ):
            stream = await connect(address(reporter))
            await stream.send_all(b"before")
            assert await read_exactly(stream, 6) == b"before"
            exposure.drain("told to stop", 0.05)
            assert await is_dropped(stream)
            await reporter.wait_for("closed")


async def test_an_agent_that_lost_its_control_connection_joins_again() -> None:
    one, two = RecordingReporter(), RecordingReporter()
    with trio.fail_after(PATIENCE):
        async with (
            relay_here() as relay,
            sharing_agent(relay, replying(b"one"), one) as first,
            sharing_agent(relay, replying(b"two"), two) as second,
        ):
            await until_ready(relay, first, second)
            relay.hang_up()
            await one.wait_for("resumed")
            await two.wait_for("resumed")
            await until_agents(relay, 2)
            assert len(one.all("opened")) == len(two.all("opened")) == 1


@pytest.mark.parametrize(
    ("mine", "theirs", "reason"),
    [
        ({"max_visitors": 5}, {"max_visitors": 7}, "open with max_visitors=5, but max_visitors=7 was requested"),
        ({}, {"bandwidth": "1M"}, "open without bandwidth, but bandwidth=1000000 was requested"),
        (
            {"allow_from": "10.0.0.0/8"},
            {"allow_from": "127.0.0.1"},
            "allow_from=10.0.0.0/8, but allow_from=127.0.0.1/32",
        ),
    ],
)
async def test_agents_whose_options_contradict_are_refused(
    each_backend: str, mine: dict[str, Value], theirs: dict[str, Value], reason: str
) -> None:
    options = {**SHARED, "persist": True}
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay, relay.access.connect() as client:
            uri = await client.open_tunnel(each_backend, **NEEDED[each_backend], **options, **mine)
            with pytest.raises(RefusedError, match=f"shared tunnel 'web' is .*{reason}") as caught:
                await client.open_tunnel(each_backend, **NEEDED[each_backend], **options, **theirs)
            assert caught.value.reply_code == "usage"
            assert await client.open_tunnel(each_backend, **NEEDED[each_backend], **options) == uri
            assert await client.open_tunnel(each_backend, **NEEDED[each_backend], **options, **mine) == uri
            port = relay.tunnel.client_uri.port
            assert await client.open_tunnel(each_backend, **NEEDED[each_backend], **options, client_port=port) == uri
            with pytest.raises(RefusedError, match=f"open with client_port={port}, but client_port=9 was requested"):
                await client.open_tunnel(each_backend, **NEEDED[each_backend], **options, client_port=9)


async def test_sharing_requires_a_name_and_persistence(each_backend: str) -> None:
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay, relay.access.connect() as client:
            for options in ({"share": True, "persist": True}, {"share": True, "name": "web"}):
                with pytest.raises(RefusedError, match="share=yes requires a name and persist=yes"):
                    await client.open_tunnel(each_backend, **NEEDED[each_backend], **options)


async def test_an_agent_that_does_not_share_replaces_sharing_ones(each_backend: str) -> None:
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay, relay.access.connect() as client:
            await client.open_tunnel(each_backend, **NEEDED[each_backend], **SHARED, persist=True)
            shared = relay.tunnel
            await client.open_tunnel(each_backend, **NEEDED[each_backend], name="web", persist=True)
            assert shared.reason == "replaced by a new tunnel of the same name and owner"
            await client.open_tunnel(each_backend, **NEEDED[each_backend], **SHARED, persist=True)
            assert relay.tunnel.spec.options.share
            assert len(relay.service.tunnels()) == 1


async def test_only_open_control_connections_count_as_agents(each_backend: str) -> None:
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay, relay.access.connect() as client:
            for _ in range(3):
                await client.open_tunnel(each_backend, **NEEDED[each_backend], **SHARED, persist=True)
            async with relay.access.connect() as other:
                await other.open_tunnel(each_backend, **NEEDED[each_backend], **SHARED, persist=True)
                assert len(relay.tunnel.agents) == 2
            await until_agents(relay, 1)
            await client.call("leave", relay.tunnel.id)
            while relay.service.tunnels():
                await trio.lowlevel.checkpoint()
