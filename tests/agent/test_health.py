"""Health checks of the local server, and what happens to visitors of an unhealthy one."""

from __future__ import annotations

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from tests.agent.support import PATIENCE, Handler, RecordingReporter, agent, local_server, relay_here, unused_port
from tests.agent.test_expose import address
from tests.support.peers import connect, read_all
from tunneld.agent.health import Check, CheckKind, HealthState, UnhealthyPolicy, judge, probe
from tunneld.agent.local import LocalServer
from tunneld.net.endpoint import Target


@given(st.integers(1, 5), st.integers(1, 5), st.lists(st.booleans(), max_size=60))
def test_only_enough_checks_in_a_row_change_the_verdict(down: int, up: int, checks: list[bool]) -> None:
    state = HealthState(Check("tcp", unhealthy_after=down, healthy_after=up))
    healthy, row = True, 0
    for passed in checks:
        row = 0 if passed is healthy else row + 1
        changes = row == (down if healthy else up)
        assert state.update(passed=passed) is changes
        if changes:
            healthy, row = passed, 0
        assert state.healthy is healthy


@pytest.mark.parametrize("line", [b"HTTP/1.1 200 OK\r\n", b"HTTP/1.0 399\r\n", b"HTTP/1.1 302 Found\n"])
def test_a_status_up_to_399_is_healthy(line: bytes) -> None:
    assert judge(line) is None


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"", "connection closed without a response"),
        (b"SSH-2.0-x\r\n", "the response is not HTTP"),
        (b"HTTP/1.1 400 Bad\r\n", "status 400"),
        (b"HTTP/1.1 199 No\r\n", "status 199"),
        (b"HTTP/2 200\r\n", "the response is not HTTP"),
        (b"x" * 1024, "the response is not HTTP"),
    ],
)
def test_anything_else_is_not(line: bytes, reason: str) -> None:
    assert judge(line) == reason


def responding(response: bytes) -> Handler:
    async def handler(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        await stream.send_all(response)

    return handler


async def silent(stream: trio.SocketStream) -> None:
    await trio.sleep_forever()


@pytest.mark.parametrize(
    ("kind", "handler", "reason"),
    [
        ("http", responding(b"HTTP/1.1 204 No Content\r\n\r\n"), None),
        ("http", responding(b"HTTP/1.1 503 Busy\r\n\r\n"), "status 503"),
        ("http", silent, "no answer in 3 s"),
        ("tcp", silent, None),
    ],
)
async def test_checking_a_real_server(
    autojump_clock: MockClock, kind: CheckKind, handler: Handler, reason: str | None
) -> None:
    async with local_server(handler) as target:
        found = await probe(LocalServer(target), Check(kind, timeout=3))
    assert (found is None) if reason is None else (found is not None and found.endswith(reason))


async def test_checking_no_server() -> None:
    found = await probe(LocalServer(Target.parse(str(unused_port()))), Check("tcp"))
    assert found is not None
    assert "connection refused" in found


async def visit_unhealthy_server(check: Check, each_backend: str) -> tuple[bytes, RecordingReporter]:
    """What a visitor of a server that fails its checks is reporter."""
    reporter = RecordingReporter()
    with trio.fail_after(PATIENCE):
        async with (
            relay_here(pairing_timeout=0.3) as relay,
            local_server(responding(b"HTTP/1.1 500 Oh\r\n\r\n")) as target,
            agent(target, relay.access, reporter, check=check) as exposure,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(exposure.run)
            await reporter.wait_for("opened")
            assert "status 500" in str((await reporter.wait_for("unhealthy"))["reason"])
            visitor = await connect(address(reporter))
            await visitor.send_all(b"GET / HTTP/1.1\r\n\r\n")
            await visitor.send_eof()
            try:
                return await read_all(visitor), reporter
            except trio.BrokenResourceError:
                return b"", reporter
            finally:
                nursery.cancel_scope.cancel()
    raise AssertionError


def quick_check(policy: UnhealthyPolicy) -> Check:
    return Check("http", interval=0.01, unhealthy_after=1, policy=policy)


async def test_visitors_of_an_unhealthy_server_are_answered(each_backend: str) -> None:
    received, _ = await visit_unhealthy_server(quick_check(UnhealthyPolicy.ANSWER), each_backend)
    assert received.startswith(b"HTTP/1.1 503 ")


async def test_visitors_of_a_withdrawn_server_wait_at_the_relay_in_vain(each_backend: str) -> None:
    received, reporter = await visit_unhealthy_server(quick_check(UnhealthyPolicy.WITHDRAW), each_backend)
    assert received == b""
    assert not reporter.all("visitor")


async def test_visitors_can_be_served_as_usual(each_backend: str) -> None:
    received, _ = await visit_unhealthy_server(quick_check(UnhealthyPolicy.TELL), each_backend)
    assert received.startswith(b"HTTP/1.1 500 ")


async def test_a_withdrawn_server_is_back_when_it_is_healthy_again(each_backend: str) -> None:
    reporter, healthy = RecordingReporter(), False

    async def handler(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        await stream.send_all(b"HTTP/1.1 200 OK\r\n\r\n" if healthy else b"HTTP/1.1 500 Oh\r\n\r\n")

    check = Check("http", interval=0.01, unhealthy_after=1, healthy_after=1, policy=UnhealthyPolicy.WITHDRAW)
    with trio.fail_after(PATIENCE):
        async with (
            relay_here() as relay,
            local_server(handler) as target,
            agent(target, relay.access, reporter, check=check) as exposure,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(exposure.run)
            await reporter.wait_for("opened")
            await reporter.wait_for("unhealthy")
            while relay.tunnel.parked:
                await trio.lowlevel.checkpoint()
            visitor = await connect(address(reporter))
            await visitor.send_all(b"GET / HTTP/1.1\r\n\r\n")
            healthy = True
            assert (await read_all(visitor)).startswith(b"HTTP/1.1 200 ")
            nursery.cancel_scope.cancel()
