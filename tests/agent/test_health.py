"""The local server is looked at, and visitors of an unhealthy one are answered, left to others, or served as ever."""

from __future__ import annotations

import socket

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from tests.agent.support import PATIENCE, Handler, Told, agent, local_server, relay_here, unused_port
from tests.agent.test_expose import address
from tests.support.people import connect, read_all
from tunneld.agent import network
from tunneld.agent.health import Check, HealthState, How, UnhealthyPolicy, judge, probe
from tunneld.agent.local import LocalServer
from tunneld.net.endpoint import Target


@given(st.integers(1, 5), st.integers(1, 5), st.lists(st.booleans(), max_size=60))
def test_it_takes_so_many_looks_in_a_row_to_change_the_judgement(down: int, up: int, looks: list[bool]) -> None:
    judgement = HealthState(Check("tcp", unhealthy_after=down, healthy_after=up))
    healthy, row = True, 0
    for passed in looks:
        row = 0 if passed is healthy else row + 1
        changes = row == (down if healthy else up)
        assert judgement.look(passed=passed) is changes
        if changes:
            healthy, row = passed, 0
        assert judgement.healthy is healthy


@pytest.mark.parametrize("line", [b"HTTP/1.1 200 OK\r\n", b"HTTP/1.0 399\r\n", b"HTTP/1.1 302 Found\n"])
def test_a_status_up_to_399_is_well(line: bytes) -> None:
    assert judge(line) is None


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"", "closed without an answer"),
        (b"SSH-2.0-x\r\n", "the answer is not HTTP"),
        (b"HTTP/1.1 400 Bad\r\n", "status 400"),
        (b"HTTP/1.1 199 No\r\n", "status 199"),
        (b"HTTP/2 200\r\n", "the answer is not HTTP"),
        (b"x" * 1024, "the answer is not HTTP"),
    ],
)
def test_anything_else_is_not(line: bytes, reason: str) -> None:
    assert judge(line) == reason


def saying(answer: bytes) -> Handler:
    async def handler(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        await stream.send_all(answer)

    return handler


async def mute(stream: trio.SocketStream) -> None:
    await trio.sleep_forever()


@pytest.mark.parametrize(
    ("how", "handler", "reason"),
    [
        ("http", saying(b"HTTP/1.1 204 No Content\r\n\r\n"), None),
        ("http", saying(b"HTTP/1.1 503 Busy\r\n\r\n"), "status 503"),
        ("http", mute, "no answer in 3 s"),
        ("tcp", mute, None),
    ],
)
async def test_a_look_at_a_real_server(
    autojump_clock: MockClock, how: How, handler: Handler, reason: str | None
) -> None:
    async with local_server(handler) as target:
        found = await probe(LocalServer(target), Check(how, timeout=3))
    assert (found is None) if reason is None else (found is not None and found.endswith(reason))


async def test_a_look_at_no_server() -> None:
    found = await probe(LocalServer(Target.parse(str(unused_port()))), Check("tcp"))
    assert found is not None
    assert "connection refused" in found


async def unhealthy_visit(check: Check, each_backend: str) -> tuple[bytes, Told]:
    """What a visitor of a server that fails its checks is told."""
    told = Told()
    with trio.fail_after(PATIENCE):
        async with (
            relay_here(pairing_timeout=0.3) as relay,
            local_server(saying(b"HTTP/1.1 500 Oh\r\n\r\n")) as target,
            agent(target, relay.access, told, check=check) as exposure,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(exposure.run)
            await told.wait_for("opened")
            assert "status 500" in str((await told.wait_for("unhealthy"))["reason"])
            visitor = await connect(address(told))
            await visitor.send_all(b"GET / HTTP/1.1\r\n\r\n")
            await visitor.send_eof()
            try:
                return await read_all(visitor), told
            except trio.BrokenResourceError:
                return b"", told
            finally:
                nursery.cancel_scope.cancel()
    raise AssertionError


def quick(conduct: UnhealthyPolicy) -> Check:
    return Check("http", interval=0.01, unhealthy_after=1, conduct=conduct)


async def test_visitors_of_an_unhealthy_server_are_told_so(each_backend: str) -> None:
    heard, _ = await unhealthy_visit(quick(UnhealthyPolicy.ANSWER), each_backend)
    assert heard.startswith(b"HTTP/1.1 503 ")


async def test_visitors_of_a_withdrawn_server_wait_at_the_relay_in_vain(each_backend: str) -> None:
    heard, told = await unhealthy_visit(quick(UnhealthyPolicy.WITHDRAW), each_backend)
    assert heard == b""
    assert not told.all("visitor")


async def test_visitors_may_be_served_as_ever(each_backend: str) -> None:
    heard, _ = await unhealthy_visit(quick(UnhealthyPolicy.TELL), each_backend)
    assert heard.startswith(b"HTTP/1.1 500 ")


async def test_a_withdrawn_server_is_back_when_it_is_well_again(each_backend: str) -> None:
    told, well = Told(), False

    async def handler(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        await stream.send_all(b"HTTP/1.1 200 OK\r\n\r\n" if well else b"HTTP/1.1 500 Oh\r\n\r\n")

    check = Check("http", interval=0.01, unhealthy_after=1, healthy_after=1, conduct=UnhealthyPolicy.WITHDRAW)
    with trio.fail_after(PATIENCE):
        async with (
            relay_here() as relay,
            local_server(handler) as target,
            agent(target, relay.access, told, check=check) as exposure,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(exposure.run)
            await told.wait_for("opened")
            await told.wait_for("unhealthy")
            while relay.tunnel.parked:
                await trio.lowlevel.checkpoint()
            visitor = await connect(address(told))
            await visitor.send_all(b"GET / HTTP/1.1\r\n\r\n")
            well = True
            assert (await read_all(visitor)).startswith(b"HTTP/1.1 200 ")
            nursery.cancel_scope.cancel()


# What ends a wait early


async def test_time_that_the_scheduler_did_not_see_wakes(autojump_clock: MockClock) -> None:
    jumps = iter([0.0, 0.0, network.JUMP, network.JUMP])
    woken = network.NetworkMonitor(lambda: next(jumps, network.JUMP), lambda: None)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(woken.run)
        assert await woken.sleep(1000) is True
        assert trio.current_time() == pytest.approx(2 * network.TICK, abs=0.1)
        assert await woken.sleep(1000) is False
        nursery.cancel_scope.cancel()


async def test_a_change_of_the_network_wakes(autojump_clock: MockClock) -> None:
    far, near = socket.socketpair()
    near.setblocking(False)
    woken = network.NetworkMonitor(lambda: 0.0, lambda: near)
    with far:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(woken.run)
            far.send(b"change")
            assert await woken.sleep(1000) is True
            nursery.cancel_scope.cancel()


def test_an_address_is_ours_until_it_is_not() -> None:
    assert network.is_ours(("127.0.0.1", 1))
    assert not network.is_ours(("192.0.2.1", 1)), "which is nobody's (RFC 5737)"
    assert not network.is_ours(("2001:db8::1", 1, 0, 0))
