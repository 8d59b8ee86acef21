"""Bulk data that passes in pipes: exactly the bytes of a body, and everything after an upgrade."""

from __future__ import annotations

import random
import socket
from collections import Counter
from collections.abc import AsyncIterator

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.engine.bench import NOISE, reset, stream, tcp_pair
from tests.sites.conftest import ORIGIN, Received, SitesBench
from tunneld.engine.engine import Cause
from tunneld.engine.plain_transport import PlainTransport
from tunneld.engine.tls_end import TlsEnd
from tunneld.sites.connection import HttpConnection
from tunneld.sites.endings import CLOSING_SECONDS

GET = b"GET /%b HTTP/1.1\r\nHost: %b\r\n\r\n"
POST = b"POST /%b HTTP/1.1\r\nHost: %b\r\nContent-Length: %d\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n"
UPGRADE = b"GET / HTTP/1.1\r\nHost: a.example\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
SWITCHED = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"


@pytest.fixture
async def piped(bench: SitesBench) -> AsyncIterator[SitesBench]:
    """A bench in which bytes passed in pipes, and none is left in one."""
    yield bench
    pipes = bench.pump.pipes
    for far in [*bench.far, *(server for site in bench.sites.values() for server in site.servers)]:
        far.socket.close()
    await wait_all_tasks_blocked()
    assert pipes.open == len(pipes._idle)


def was_spliced(bench: SitesBench) -> bool:
    return bench.pump.pipes.open > 0


async def send_large(peer: trio.SocketStream, head: bytes, *behind: bytes) -> None:
    """Send `NOISE` behind a head."""
    for part in (head, NOISE, *behind):
        await peer.send_all(part)


async def test_a_response_ends_after_exactly_its_bytes(piped: SitesBench) -> None:
    site = piped.site("a.example")
    visitor = piped.visit(SO_RCVBUF=65_536, SO_SNDBUF=65_536)
    async with trio.open_nursery() as nursery:
        await visitor.far.send_all(GET % (b"1", b"a.example") + GET % (b"2", b"a.example"))
        server = await site.server()
        await server.head()
        nursery.start_soon(send_large, server.far, OK % len(NOISE))
        await visitor.head()
        assert await visitor.exactly(len(NOISE)) == NOISE
    assert (await server.head())[0] == b"GET /2 HTTP/1.1"
    await server.far.send_all(OK % 2 + b"ok")
    assert await visitor.response() == (b"HTTP/1.1 200 OK", b"ok")
    assert was_spliced(piped)


async def test_bytes_behind_a_large_response_never_reach_the_visitor(piped: SitesBench) -> None:
    site = piped.site("a.example")
    visitor = piped.visit(SO_RCVBUF=65_536, SO_SNDBUF=65_536)
    await visitor.far.send_all(GET % (b"", b"a.example"))
    server = await site.server()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send_large, server.far, OK % len(NOISE), OK % 5 + b"wrong")
        await visitor.head()
        assert await visitor.exactly(len(NOISE)) == NOISE
    await visitor.far.send_all(GET % (b"", b"a.example"))
    await site.server(1)
    await site.servers[1].send_all(OK % 5 + b"right")
    assert await visitor.response() == (b"HTTP/1.1 200 OK", b"right")
    assert (await site.ends[0].one()).cause is Cause.RESET
    assert was_spliced(piped)


async def test_the_request_behind_a_large_body_goes_to_its_own_site(piped: SitesBench) -> None:
    sites = [piped.site("a.example"), piped.site("b.example")]
    visitor = piped.visit(SO_RCVBUF=65_536, SO_SNDBUF=65_536)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send_large, visitor.far, POST % (b"", b"a.example", len(NOISE)), GET % (b"", b"b.example"))
        server = await sites[0].server()
        await server.head()
        assert await server.exactly(len(NOISE)) == NOISE
        assert not sites[1].servers
        await server.far.send_all(OK % 1 + b"a")
        assert (await visitor.response())[1] == b"a"
        other = await sites[1].server()
        assert (await other.head())[1] == b"Host: b.example"
        await other.far.send_all(OK % 1 + b"b")
        assert (await visitor.response())[1] == b"b"
    assert await server.rest() == b""
    assert was_spliced(piped)


async def test_bodies_of_any_length_arrive_whole_and_in_order(piped: SitesBench) -> None:
    """One visitor sends requests ahead, for two sites; both bodies have lengths around those of the buffers."""
    dice = random.Random(15)
    sizes = [0, 1, 65_535, 65_536, 65_537, 131_072, 200_000, 700_000]
    plan = [(dice.choice([b"a", b"b"]), dice.choice(sizes), dice.choice(sizes)) for _ in range(30)]
    for name in ("a", "b"):
        piped.site(f"{name}.example")
    visitor = piped.visit(SO_RCVBUF=65_536, SO_SNDBUF=65_536)

    async def ask() -> None:
        for number, (name, up, _) in enumerate(plan):
            await visitor.far.send_all(POST % (b"%d" % number, name + b".example", up) + NOISE[number : number + up])

    async def answer() -> None:
        former, servers = b"", Counter[bytes]()
        for number, (name, up, down) in enumerate(plan):
            if former != name:  # then it has a connection of its own
                server = await piped.sites[f"{name.decode()}.example"].server(servers[name])
                servers[name] += 1
            former = name
            assert (await server.head())[0] == b"POST /%d HTTP/1.1" % number
            assert await server.exactly(up) == NOISE[number : number + up]
            await server.far.send_all(OK % down + NOISE[-down or len(NOISE) :])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        nursery.start_soon(answer)
        for _, _, down in plan:
            assert (await visitor.response())[1] == NOISE[-down or len(NOISE) :]
    assert was_spliced(piped)


async def test_a_slow_server_gets_all_of_an_upload(piped: SitesBench) -> None:
    site = piped.site("a.example")
    visitor = piped.visit(SO_RCVBUF=65_536, SO_SNDBUF=65_536)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send_large, visitor.far, POST % (b"", b"a.example", 3 * len(NOISE)), NOISE, NOISE)
        server = await site.server()
        await server.head()
        for _ in range(3):
            await wait_all_tasks_blocked(0.001)  # until all buffers are full
            assert await server.exactly(len(NOISE)) == NOISE
        await server.far.send_all(OK % 0)
        await visitor.response()
    assert was_spliced(piped)


async def test_an_answer_before_the_end_of_a_large_upload_closes_the_connection(piped: SitesBench) -> None:
    """While bytes wait in a pipe for a server that does not read them; the visitor that leaves then is noticed."""
    site = piped.site("a.example")
    visitor = piped.visit(SO_RCVBUF=65_536, SO_SNDBUF=65_536)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send_large, visitor.far, POST % (b"", b"a.example", 10**9), *[NOISE] * 20)
        server = await site.server()
        await server.head()
        assert await server.exactly(len(NOISE)) == NOISE
        await wait_all_tasks_blocked(0.01)
        await server.far.send_all(OK % 3 + b"no!")
        await visitor.head()
        assert await visitor.exactly(3) == b"no!"
        assert await visitor.far.receive_some() == b""
    await visitor.far.send_eof()
    with trio.fail_after(CLOSING_SECONDS / 2):  # all of it was read and discarded
        while not piped.over:
            await wait_all_tasks_blocked(0.001)
    assert was_spliced(piped)


@pytest.mark.parametrize("cut", [lambda far: far.socket.close(), reset], ids=["end of file", "reset"])
@pytest.mark.parametrize("reads", [True, False])
async def test_a_server_that_is_cut_off_in_a_large_response(piped: SitesBench, cut: object, reads: bool) -> None:
    site = piped.site("a.example")
    visitor = piped.visit(SO_RCVBUF=65_536, SO_SNDBUF=65_536)
    await visitor.far.send_all(GET % (b"", b"a.example"))
    server = await site.server()
    await server.far.send_all(OK % 10**9)
    await visitor.head()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.far.send_all, NOISE)
        assert await visitor.exactly(len(NOISE)) == NOISE
        if not reads:
            nursery.start_soon(server.far.send_all, NOISE)
            await wait_all_tasks_blocked(0.001)
            nursery.cancel_scope.cancel()
    cut(server.far)  # type: ignore[operator]
    with pytest.raises(trio.BrokenResourceError):
        await visitor.rest()
    assert (await site.ends[0].one()).cause is Cause.RESET
    assert was_spliced(piped)


@pytest.mark.parametrize("cut", [lambda far: far.socket.close(), reset], ids=["end of file", "reset"])
@pytest.mark.parametrize("reads", [True, False])
async def test_a_visitor_that_is_cut_off_in_a_large_upload(piped: SitesBench, cut: object, reads: bool) -> None:
    site = piped.site("a.example")
    visitor = piped.visit(SO_RCVBUF=65_536, SO_SNDBUF=65_536)
    await visitor.far.send_all(POST % (b"", b"a.example", 10**9))
    server = await site.server()
    await server.head()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(visitor.far.send_all, NOISE)
        assert await server.exactly(len(NOISE)) == NOISE
        if not reads:
            nursery.start_soon(visitor.far.send_all, NOISE)
            await wait_all_tasks_blocked(0.001)
            nursery.cancel_scope.cancel()
    cut(visitor.far)  # type: ignore[operator]
    with pytest.raises(trio.BrokenResourceError):
        await server.rest()
    assert (await site.ends[0].one()).cause is Cause.RESET
    assert was_spliced(piped)


async def test_a_visitor_that_half_closes_behind_a_large_upload_gets_its_response(piped: SitesBench) -> None:
    site = piped.site("a.example")
    visitor = piped.visit(SO_RCVBUF=65_536, SO_SNDBUF=65_536)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send_large, visitor.far, POST % (b"", b"a.example", len(NOISE)))
        server = await site.server()
        await server.head()
        assert await server.exactly(len(NOISE)) == NOISE
    await visitor.far.send_eof()
    await wait_all_tasks_blocked()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send_large, server.far, OK % len(NOISE))
        await visitor.head()
        assert await visitor.exactly(len(NOISE)) == NOISE
    assert await visitor.rest() == b""
    assert await server.rest() == b""
    assert was_spliced(piped)


async def upload_whose_end_waits(bench: SitesBench) -> tuple[int, Received, Received]:
    """An upload that has come wholly, and the end of it is in a pipe, since the server does not read: its size, the
    visitor and the server. How much fits the buffers of the kernel depends on that.
    """
    for size in range(100_000, 600_000, 10_000):
        site = bench.site(f"{size}.example")
        visitor = bench.visit(SO_RCVBUF=212_992, SO_SNDBUF=212_992)
        await visitor.far.send_all(POST % (b"1", b"%d.example" % size, size))
        server = await site.server()
        await server.head()
        with trio.move_on_after(0.05):
            await visitor.far.send_all(NOISE[:size])
        await wait_all_tasks_blocked(0.001)
        if len(bench.pump.pipes._idle) < bench.pump.pipes.open:
            assert not bench.connections[-1]._input.awaits_body
            return size, visitor, server
        await server.exactly(size)
    raise AssertionError("no size is right")


async def test_a_server_that_answers_an_upload_it_has_not_read_gets_the_next_request_behind_it(
    piped: SitesBench,
) -> None:
    size, visitor, server = await upload_whose_end_waits(piped)
    await server.far.send_all(OK % 0)
    await visitor.response()
    await visitor.far.send_all(GET % (b"2", b"%d.example" % size))
    await wait_all_tasks_blocked(0.001)
    assert await server.exactly(size) == NOISE[:size]
    assert (await server.head())[0] == b"GET /2 HTTP/1.1"
    await server.far.send_all(OK % 0)
    await visitor.response()


async def test_an_end_of_file_comes_behind_what_waits_in_a_pipe(piped: SitesBench) -> None:
    size, visitor, server = await upload_whose_end_waits(piped)
    await server.far.send_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
    await visitor.response()
    await visitor.far.aclose()
    await wait_all_tasks_blocked(0.001)
    assert await server.exactly(size) == NOISE[:size]
    assert await server.rest() == b""


async def test_a_visitor_that_is_reset_takes_nothing_along_that_waits_in_a_pipe(piped: SitesBench) -> None:
    size, visitor, server = await upload_whose_end_waits(piped)
    reset(visitor.far)
    await wait_all_tasks_blocked(0.001)
    assert await server.exactly(size) == NOISE[:size]
    with pytest.raises(trio.BrokenResourceError):
        await server.rest()


async def test_everything_after_an_upgrade_passes_in_pipes(piped: SitesBench) -> None:
    site = piped.site("a.example")
    visitor = piped.visit(SO_RCVBUF=65_536, SO_SNDBUF=65_536)
    await visitor.far.send_all(UPGRADE)
    server = await site.server()
    await server.head()
    await server.far.send_all(SWITCHED)
    await visitor.head()
    for _ in range(2):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(visitor.far.send_all, NOISE)
            nursery.start_soon(server.far.send_all, NOISE)
            await wait_all_tasks_blocked(0.001)
            assert await visitor.exactly(len(NOISE)) == NOISE
            assert await server.exactly(len(NOISE)) == NOISE
    await server.far.send_eof()
    assert await visitor.rest() == b""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(visitor.far.send_all, NOISE)
        assert await server.exactly(len(NOISE)) == NOISE
    await visitor.far.send_eof()
    assert await server.rest() == b""
    assert (await site.ends[0].one()).cause is Cause.FINISHED
    relay = site.ends[0].told[0][0]
    assert relay.up > 3 * len(NOISE)
    assert relay.down > 2 * len(NOISE)
    assert was_spliced(piped)


async def test_a_throttle_counts_bytes_before_they_are_read_and_takes_no_pipe(piped: SitesBench) -> None:
    site = piped.site("a.example")
    site.throttle = piped.pump.limit(None, 10 * len(NOISE), lambda: None)
    visitor = piped.visit()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send_large, visitor.far, POST % (b"", b"a.example", len(NOISE)))
        server = await site.server()
        await server.head()
        assert site.streams[0].pipe_taker is None
        assert await server.exactly(len(NOISE)) == NOISE
        nursery.start_soon(send_large, server.far, OK % len(NOISE))
        await visitor.head()
        assert await visitor.exactly(len(NOISE)) == NOISE
    assert not was_spliced(piped)
    assert site.throttle.left is not None
    assert 7 * len(NOISE) < site.throttle.left < 8 * len(NOISE)


async def test_a_visitor_behind_a_socket_pair_takes_no_pipe(piped: SitesBench) -> None:
    """That is how streams of HTTP/2 come; not every kernel splices to such sockets."""
    site = piped.site("a.example")
    far, near = socket.socketpair()
    for end in (far, near):
        end.setblocking(False)
    connection = HttpConnection(
        TlsEnd(piped.pump, PlainTransport(near)), ORIGIN, piped.find, piped.limits, piped.over.append
    )
    connection.start()
    piped.far.append(stream(far))
    visitor = Received(piped.far[-1])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send_large, visitor.far, POST % (b"", b"a.example", len(NOISE)))
        server = await site.server()
        await server.head()
        assert await server.exactly(len(NOISE)) == NOISE
        nursery.start_soon(send_large, server.far, OK % len(NOISE))
        await visitor.head()
        assert await visitor.exactly(len(NOISE)) == NOISE
    assert not was_spliced(piped)


async def test_a_write_that_fails_at_once_is_reported_by_the_next_flush() -> None:
    far, near = tcp_pair()
    far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    transport = PlainTransport(near)
    far.close()
    transport.write(NOISE)
    with pytest.raises(OSError, match=r"Connection reset|Broken pipe"):
        transport.flush()
    assert transport.pending_output == 0
    transport.close()
