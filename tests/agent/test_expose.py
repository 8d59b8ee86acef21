"""The agent and a real relay, over real sockets."""

from __future__ import annotations

import gc
import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import trio

from tests.agent.support import PATIENCE, RecordingReporter, echo, exposed, local_server, relay_here, unused_port
from tests.support.peers import connect, is_dropped, read_all, read_exactly
from tunneld.agent.request import TunnelRequest
from tunneld.net.endpoint import Endpoint, Target
from tunneld.wire.proxy_protocol import decode_v2

pytestmark = pytest.mark.usefixtures("each_backend")


def address(reporter: RecordingReporter, count: int = 0) -> Endpoint:
    return Endpoint.parse(str(reporter.all("opened")[count]["address"]))


async def ask(endpoint: Endpoint, question: bytes) -> bytes:
    """Send the question and the end, and read the answer up to its end."""
    stream = await connect(endpoint)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send_and_end, stream, question)
        return await read_all(stream)


async def send_and_end(stream: trio.SocketStream, question: bytes) -> None:
    await stream.send_all(question)
    await stream.send_eof()


async def test_a_visitor_reaches_the_local_server_and_both_events_are_reported() -> None:
    reporter = RecordingReporter()
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay, local_server(echo) as target, exposed(target, relay.access, reporter):
            stream = await connect(address(reporter))
            await stream.send_all(b"hello")
            assert await read_exactly(stream, 5) == b"hello"
            me = f"127.0.0.1:{stream.socket.getsockname()[1]}"
            assert (await reporter.wait_for("visitor"))["visitor"] == me
            await stream.aclose()
            assert await reporter.wait_for("left") == {"visitor": me, "up": 5, "down": 5, "reason": "finished"}


async def test_visitors_leave_nothing_to_the_garbage_collector() -> None:
    """Neither at the relay nor at the agent: it does not see what OpenSSL holds, so that memory would pile up."""
    reporter = RecordingReporter(wants_visitors=False)
    with trio.fail_after(PATIENCE):
        async with (
            relay_here() as relay,
            local_server(echo) as target,
            exposed(target, relay.access, reporter) as exposure,
        ):
            with collector_off() as left:
                for _ in range(10):
                    assert await ask(address(reporter), b"hello") == b"hello"
                while exposure.stats.now or relay.tunnel.visitors:
                    await trio.lowlevel.checkpoint()
            assert left == Counter()


@contextmanager
def collector_off() -> Iterator[Counter[str]]:
    """Disable the garbage collector for the block; afterwards the counter has what it would have freed, by type."""
    left = Counter[str]()
    gc.collect()
    gc.disable()
    try:
        yield left
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        left.update(type(thing).__name__ for thing in gc.garbage)
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


async def test_a_server_can_send_first() -> None:
    async def greet(stream: trio.SocketStream) -> None:
        await stream.send_all(b"SSH-2.0-test\r\n")
        with suppress(trio.BrokenResourceError):  # the test ends before the visitor
            await stream.receive_some()

    reporter = RecordingReporter()
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay, local_server(greet) as target, exposed(target, relay.access, reporter):
            assert await read_exactly(await connect(address(reporter)), 14) == b"SSH-2.0-test\r\n"


async def test_the_local_server_is_not_dialled_before_a_visitor_arrives() -> None:
    connections = 0

    async def count(stream: trio.SocketStream) -> None:
        nonlocal connections
        connections += 1
        await read_all(stream)
        await stream.send_eof()

    reporter = RecordingReporter()
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay, local_server(count) as target, exposed(target, relay.access, reporter):
            assert await ask(address(reporter), b"?") == b""
            assert connections == 1


async def test_a_half_close_crosses_both_hops_and_the_answer_comes_back_after_it() -> None:
    async def answer_after_end(stream: trio.SocketStream) -> None:
        await stream.send_all(hashlib.sha256(await read_all(stream)).digest())
        await stream.send_eof()

    question = os.urandom(3_000_000)
    reporter = RecordingReporter()
    with trio.fail_after(PATIENCE):
        async with (
            relay_here() as relay,
            local_server(answer_after_end) as target,
            exposed(target, relay.access, reporter),
        ):
            assert await ask(address(reporter), question) == hashlib.sha256(question).digest()


async def test_200_visitors_at_once_each_get_their_own_bytes() -> None:
    answers: dict[bytes, bytes] = {}

    async def visit(endpoint: Endpoint, question: bytes) -> None:
        answers[question] = await ask(endpoint, question)

    questions = [os.urandom(20_000) for _ in range(200)]
    reporter = RecordingReporter(wants_visitors=False)
    with trio.fail_after(PATIENCE):
        async with (
            relay_here() as relay,
            local_server(echo) as target,
            exposed(target, relay.access, reporter) as exposure,
        ):
            async with trio.open_nursery() as nursery:
                for question in questions:
                    nursery.start_soon(visit, address(reporter), question)
            assert answers == {question: question for question in questions}
            assert (exposure.stats.served, exposure.stats.failed) == (200, 0)


async def test_if_the_local_server_is_down_the_visitor_is_closed_at_once_and_it_is_reported_once() -> None:
    port = unused_port()
    reporter = RecordingReporter()
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay, exposed(Target.parse(str(port)), relay.access, reporter) as exposure:
            for _ in range(3):
                assert await is_dropped(await connect(address(reporter)))
            failed = await reporter.wait_for("failed")
            assert failed["reason"] == f"could not connect to 127.0.0.1:{port}: connection refused"
            while exposure.stats.failed < 3:
                await trio.lowlevel.checkpoint()
            assert len(reporter.all("failed")) == 1
            assert exposure.stats.served == 0


async def test_a_local_server_that_comes_up_later_is_reached() -> None:
    port = unused_port()
    reporter = RecordingReporter()
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay, exposed(Target.parse(str(port)), relay.access, reporter):
            assert await is_dropped(await connect(address(reporter)))
            async with trio.open_nursery() as nursery:
                await nursery.start(trio.serve_tcp, echo, port)
                assert await ask(address(reporter), b"now?") == b"now?"
                nursery.cancel_scope.cancel()


async def test_a_name_with_several_addresses_reaches_the_one_that_answers() -> None:
    reporter = RecordingReporter()
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay, local_server(echo) as target:
            by_name = Target.parse(f"localhost:{target.port}")
            async with exposed(by_name, relay.access, reporter):
                assert await ask(address(reporter), b"1") == b"1"
                assert await ask(address(reporter), b"2") == b"2"


async def test_a_unix_socket_with_a_full_backlog_loses_no_visitor(tmp_path: Path) -> None:
    path = tmp_path / "server.sock"
    listener = trio.socket.socket(trio.socket.AF_UNIX)
    reporter = RecordingReporter()
    with trio.fail_after(PATIENCE), listener:
        await listener.bind(str(path))
        listener.listen(1)
        async with (
            relay_here() as relay,
            exposed(Target.parse(f"unix:{path}"), relay.access, reporter) as exposure,
            trio.open_nursery() as nursery,
        ):
            answers: list[bytes] = []

            async def visit(question: bytes) -> None:
                answers.append(await ask(address(reporter), question))

            for number in range(20):
                nursery.start_soon(visit, b"%d" % number)
            while exposure.stats.now < 2:
                await trio.lowlevel.checkpoint()
            nursery.start_soon(trio.serve_listeners, echo, [trio.SocketListener(listener)])
            while len(answers) < 20:
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
        assert sorted(answers) == sorted(b"%d" % number for number in range(20))


async def test_a_missing_unix_socket_is_reported() -> None:
    reporter = RecordingReporter()
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay, exposed(Target.parse("unix:/nowhere/at.all"), relay.access, reporter):
            assert await is_dropped(await connect(address(reporter)))
            reason = (await reporter.wait_for("failed"))["reason"]
            assert reason == "could not connect to unix:/nowhere/at.all: no such file or directory"


@pytest.mark.parametrize("keep_header", [True, False])
async def test_the_header_reaches_the_local_server_only_if_requested(keep_header: bool) -> None:
    reporter = RecordingReporter()
    with trio.fail_after(PATIENCE):
        async with (
            relay_here() as relay,
            local_server(echo) as target,
            exposed(target, relay.access, reporter, TunnelRequest(keep_header=keep_header)),
        ):
            stream = await connect(address(reporter))
            me = stream.socket.getsockname()
            await send_and_end(stream, b"hello")
            answer = await read_all(stream)
            decoded = decode_v2(answer) if keep_header else None
            assert (decoded[0].source if decoded else None) == (me if keep_header else None)
            assert answer[28 if keep_header else 0 :] == b"hello"


async def test_the_tunnel_is_closed_at_the_relay_when_the_agent_ends() -> None:
    reporter = RecordingReporter()
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay, local_server(echo) as target:
            async with exposed(target, relay.access, reporter):
                assert relay.tunnel.client_uri == address(reporter)
            assert list(relay.service.tunnels()) == []
            assert [event for event, _ in reporter.events] == ["opened", "closed"]


async def test_a_tunnel_whose_quota_is_used_up_closes_with_that_reason() -> None:
    reporter = RecordingReporter()
    with trio.fail_after(PATIENCE):
        async with (
            relay_here() as relay,
            local_server(echo) as target,
            exposed(target, relay.access, reporter, TunnelRequest({"quota": "10k", "bandwidth": "100M"})),
        ):
            tunnel = relay.tunnel
            assert (tunnel.limits.quota, tunnel.limits.bandwidth) == (10_000, 100_000_000)
            stream = await connect(address(reporter))
            await stream.send_all(bytes(6_000))
            assert await is_dropped_after(stream, 4_000)
            await tunnel.wait_closed()
            assert tunnel.reason == "quota of 10000 bytes is used up (quota)"


async def is_dropped_after(stream: trio.SocketStream, limit: int) -> bool:
    """Whether at most `limit` bytes arrive before the end."""
    count = 0
    try:
        while chunk := await stream.receive_some():
            count += len(chunk)
    except trio.BrokenResourceError:
        pass
    return count <= limit
