"""Requests are routed one by one, and responses come back to the visitor that asked; hidden servers of every temper."""

from __future__ import annotations

import dataclasses
import gc
import random
import weakref
from collections import Counter

import pytest
import trio
from trio.testing import MockClock

from tests.engine.bench import NOISE, reset
from tests.sites.conftest import Received, SitesBench
from tunneld.engine.engine import Cause
from tunneld.policy.limits import HttpLimits
from tunneld.sites.fields import HostRewrite
from tunneld.sites.input import REQUEST_COST

GET = b"GET /%b HTTP/1.1\r\nHost: %b\r\n\r\n"


def ok(body: bytes, *lines: bytes) -> bytes:
    return b"\r\n".join([b"HTTP/1.1 200 OK", b"Content-Length: %d" % len(body), *lines, b"", body])


async def test_a_request_reaches_its_site_and_the_response_the_visitor(bench: SitesBench) -> None:
    site = bench.site("a.example")
    visitor = bench.visit()
    await visitor.far.send_all(GET % (b"x?y", b"a.example"))
    server = await site.server()
    head = await server.head()
    assert head[:2] == [b"GET /x?y HTTP/1.1", b"Host: a.example"]
    assert b"X-Forwarded-For: 192.0.2.7" in head
    identity = next(line for line in head if line.startswith(b"X-Request-Id: "))
    await server.far.send_all(ok(b"hello", b"Server: test"))
    assert await visitor.head() == [b"HTTP/1.1 200 OK", b"Content-Length: 5", b"Server: test", identity]
    assert await visitor.exactly(5) == b"hello"


async def test_requests_of_one_connection_go_each_to_its_site(bench: SitesBench) -> None:
    sites = {host: bench.site(host.decode()) for host in (b"a.example", b"b.example")}
    visitor = bench.visit()
    for number, host in enumerate([b"a.example", b"a.example", b"b.example", b"a.example"]):
        await visitor.far.send_all(GET % (b"%d" % number, host))
        await trio.testing.wait_all_tasks_blocked()
        server = Received(sites[host].servers[-1])
        assert (await server.head())[0] == b"GET /%d HTTP/1.1" % number
        await server.far.send_all(ok(b"%d %b" % (number, host)))
        await visitor.head()
        assert await visitor.exactly(len(host) + 2) == b"%d %b" % (number, host)
    assert len(sites[b"a.example"].servers) == 2  # one for two requests in a row, one after the change
    assert len(sites[b"b.example"].servers) == 1
    assert await sites[b"b.example"].servers[0].receive_some() == b""
    await sites[b"b.example"].servers[0].send_eof()
    assert (await sites[b"b.example"].ends[0].one()).cause is Cause.FINISHED


async def test_pipelined_requests_are_answered_in_order(bench: SitesBench) -> None:
    sites = {host: bench.site(host.decode()) for host in (b"a.example", b"b.example")}
    visitor = bench.visit()
    hosts = [b"a.example", b"b.example", b"unknown.example", b"a.example"]
    await visitor.far.send_all(b"".join(GET % (b"%d" % number, host) for number, host in enumerate(hosts)))
    for number, host in enumerate(hosts):
        await trio.testing.wait_all_tasks_blocked()
        if host in sites:
            assert (await Received(sites[host].servers[-1]).head())[0] == b"GET /%d HTTP/1.1" % number
            await sites[host].servers[-1].send_all(ok(b"%d" % number))
        status, body = await visitor.response()
        assert (status, body[:1]) == (
            (b"HTTP/1.1 200 OK", b"%d" % number) if host in sites else (b"HTTP/1.1 404 Not Found", b"4")
        )


async def test_a_visitor_that_reads_no_responses_is_asked_no_more(bench: SitesBench) -> None:
    asked, count = Counter[int](), 5000
    find = bench.find
    bench.find = lambda request: (asked.update([0]), find(request))[1]  # type: ignore[method-assign]
    visitor = bench.visit(SO_RCVBUF=4096, SO_SNDBUF=4096)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(visitor.far.send_all, GET % (b"", b"unknown.example") * count)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert asked.total() < count // 2
        for _ in range(count):
            assert (await visitor.response())[0] == b"HTTP/1.1 404 Not Found"


async def test_requests_that_were_sent_ahead_share_a_part_of_each_turn(bench: SitesBench) -> None:
    asked, count = Counter[int](), 1000
    find = bench.find
    bench.find = lambda request: (asked.update([bench.pump.budget.turn]), find(request))[1]  # type: ignore[method-assign]
    visitors = [bench.visit() for _ in range(4)]
    for visitor in visitors:
        await visitor.far.send_all(GET % (b"", b"u") * count)
    for visitor in visitors:
        for _ in range(count):
            await visitor.response()
    first = len(visitors)  # of each visitor, at once
    assert max(asked.values()) <= first + bench.pump.limits.turn_cost // REQUEST_COST + 1


async def test_the_connection_to_the_server_ends_with_it_though_the_visitor_left_first(bench: SitesBench) -> None:
    site = bench.site("a.example")
    visitor = bench.visit()
    await visitor.far.send_all(GET % (b"", b"a.example"))
    server = await site.server()
    await server.head()
    await server.far.send_all(ok(b"hello"))
    await visitor.response()
    await visitor.far.aclose()
    assert await server.far.receive_some() == b""
    await server.far.send_all(b"what nobody asked for")
    await server.far.send_eof()
    assert (await site.ends[0].one()).cause is Cause.FINISHED


@pytest.mark.interpreted  # compiled classes have no weak references
async def test_a_connection_is_freed_without_the_garbage_collector(bench: SitesBench) -> None:
    site = bench.site("a.example")
    gc.disable()
    try:
        visitor = bench.visit()
        connection = weakref.ref(bench.connections.pop())
        await visitor.far.send_all(GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n") % (b"", b"a.example"))
        server = await site.server()
        await server.head()
        await server.far.send_all(ok(b"hello"))
        await visitor.response()
        assert connection() is not None
        await visitor.far.aclose()
        assert await server.far.receive_some() == b""
        await server.far.send_eof()
        await site.ends[0].one()
        while not bench.over:
            await trio.testing.wait_all_tasks_blocked()
        for kept in (bench.over, site.streams, site.ends[0].told, site.ends):
            kept.clear()
        assert connection() is None
    finally:
        gc.enable()


BODIES = {"known length": False, "chunked": True}


@pytest.mark.parametrize("chunked", BODIES.values(), ids=BODIES)
async def test_large_bodies_pass_both_ways_at_once(bench: SitesBench, chunked: bool) -> None:
    site = bench.site("a.example")
    visitor = bench.visit(SO_RCVBUF=4096, SO_SNDBUF=4096)
    framing = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % len(NOISE)

    def framed() -> list[bytes]:
        if not chunked:
            return [NOISE]
        at, pieces, sizes = 0, [], random.Random(1)
        while at < len(NOISE):
            piece = NOISE[at : at + sizes.randint(1, 70000)]
            pieces.append(b"%x;ext=1\r\n%b\r\n" % (len(piece), piece))
            at += len(piece)
        return [*pieces, b"0\r\n\r\n"]

    async def read(peer: Received) -> None:
        if not chunked:
            assert await peer.exactly(len(NOISE)) == NOISE
            return
        data = b""
        while size := int((await peer.until(b"\r\n")).strip(), 16):
            data += await peer.exactly(size)
            assert await peer.exactly(2) == b"\r\n"
        assert await peer.exactly(2) == b"\r\n"
        assert data == NOISE

    async def send(peer: trio.SocketStream, head: bytes) -> None:
        await peer.send_all(head + framing + b"\r\n\r\n")
        for piece in framed():
            await peer.send_all(piece)

    for _ in range(2):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send, visitor.far, b"POST / HTTP/1.1\r\nHost: a.example\r\n")
            await trio.testing.wait_all_tasks_blocked()
            server = Received(site.servers[0])
            assert framing in await server.head()
            nursery.start_soon(read, server)
            nursery.start_soon(send, server.far, b"HTTP/1.1 200 OK\r\n")
            assert framing in await visitor.head()
            await read(visitor)
    assert len(site.servers) == 1


@pytest.mark.parametrize("size", [32_000, 33_000, 60_000, 65_000])
async def test_a_body_that_comes_in_one_read_with_its_head_is_passed_on(bench: SitesBench, size: int) -> None:
    """Together they may be longer than a head."""
    site = bench.site("a.example")
    visitor = bench.visit()
    request = b"POST / HTTP/1.1\r\nHost: a.example\r\nContent-Length: %d\r\n\r\n" % size
    await visitor.far.send_all(request + NOISE[:size] + GET % (b"next", b"a.example"))
    server = await site.server()
    await server.head()
    assert await server.exactly(size) == NOISE[:size]
    await server.far.send_all(ok(b"first"))
    await visitor.response()
    assert (await server.head())[0] == b"GET /next HTTP/1.1"
    await server.far.send_all(ok(b"second"))
    await visitor.response()


async def test_the_engine_may_stop_while_a_visitor_sends(bench: SitesBench) -> None:
    site = bench.site("a.example")
    visitor = bench.visit()
    await visitor.far.send_all(b"POST / HTTP/1.1\r\nHost: a.example\r\nTransfer-Encoding: chunked\r\n\r\n7fffffff\r\n")
    server = await site.server()
    await server.head()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(visitor.far.send_all, NOISE * 8)
        while not bench.connections[0]._end.buffered:
            await trio.testing.wait_all_tasks_blocked(0.001)
        nursery.cancel_scope.cancel()


async def test_a_response_of_unknown_length_ends_with_the_connection(bench: SitesBench) -> None:
    site = bench.site("a.example")
    visitor = bench.visit()
    await visitor.far.send_all(GET % (b"", b"a.example"))
    await (await site.server()).far.send_all(b"HTTP/1.1 200 OK\r\n\r\nhello")
    assert b"Connection: close" in await visitor.head()
    await site.servers[0].send_eof()
    assert await visitor.rest() == b"hello"
    await visitor.far.send_eof()
    assert await site.servers[0].receive_some(65536)
    assert await site.servers[0].receive_some() == b""
    assert (await site.ends[0].one()).cause is Cause.FINISHED
    await trio.testing.wait_all_tasks_blocked()
    assert len(bench.over) == 1


async def test_server_sent_events_are_never_held(bench: SitesBench) -> None:
    site = bench.site("a.example")
    visitor = bench.visit()
    await visitor.far.send_all(GET % (b"", b"a.example"))
    await (await site.server()).far.send_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    await visitor.head()
    for number in range(10):
        await site.servers[0].send_all(b"9\r\ndata: %d\n\n\r\n" % number)
        assert await visitor.exactly(14) == b"9\r\ndata: %d\n\n\r\n" % number


async def test_100_continue_passes_and_so_do_early_hints(bench: SitesBench) -> None:
    site = bench.site("a.example")
    visitor = bench.visit()
    await visitor.far.send_all(
        b"POST / HTTP/1.1\r\nHost: a.example\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n"
    )
    server = await site.server()
    assert b"Expect: 100-continue" in await server.head()
    await server.far.send_all(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n")
    assert await visitor.head() == [b"HTTP/1.1 103 Early Hints", b"Link: </a>"]
    assert await visitor.head() == [b"HTTP/1.1 100 Continue"]
    await visitor.far.send_all(b"hello")
    assert await server.exactly(5) == b"hello"
    await server.far.send_all(ok(b"done"))
    await visitor.head()
    assert await visitor.exactly(4) == b"done"


async def test_http_1_0_gets_no_interim_responses(bench: SitesBench) -> None:
    site = bench.site("a.example")
    visitor = bench.visit()
    await visitor.far.send_all(b"GET / HTTP/1.0\r\nHost: a.example\r\nConnection: keep-alive\r\n\r\n")
    await (await site.server()).far.send_all(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + ok(b"hello"))
    head = await visitor.head()
    assert (head[0], head[-2]) == (b"HTTP/1.1 200 OK", b"Connection: keep-alive")


@pytest.mark.parametrize("asked", [True, False])
async def test_a_visitor_that_was_not_asked_for_its_body_may_leave_it_out(bench: SitesBench, asked: bool) -> None:
    """It may send the body all the same, so the relay cannot know what comes next on the connection."""
    site = bench.site("a.example")
    visitor = bench.visit()
    await visitor.far.send_all(
        b"POST / HTTP/1.1\r\nHost: a.example\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n"
    )
    server = await site.server()
    if asked:
        await server.far.send_all(b"HTTP/1.1 100 Continue\r\n\r\n")
        await visitor.head()
        await visitor.far.send_all(b"hello")
        await server.until(b"hello")
    await server.far.send_all(ok(b"no"))
    assert (b"Connection: close" in await visitor.head()) is not asked
    assert await visitor.exactly(2) == b"no"


async def test_an_answer_before_the_end_of_an_upload_arrives(bench: SitesBench) -> None:
    site = bench.site("a.example")
    visitor = bench.visit()
    await visitor.far.send_all(b"POST / HTTP/1.1\r\nHost: a.example\r\nContent-Length: 1000000\r\n\r\nhello")
    await (await site.server()).far.send_all(
        b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\nConnection: close\r\n\r\nno!"
    )
    site.servers[0].socket.close()
    assert (await visitor.head())[0] == b"HTTP/1.1 413 Too Large"
    assert await visitor.rest() == b"no!"


async def test_websocket_bytes_pass_both_ways_after_an_upgrade(bench: SitesBench) -> None:
    site = bench.site("a.example")
    visitor = bench.visit()
    await visitor.far.send_all(
        b"GET /ws HTTP/1.1\r\nHost: a.example\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nearly"
    )
    server = await site.server()
    assert (await server.head())[-3:-1] == [b"Connection: Upgrade", b"Upgrade: websocket"]
    await server.far.send_all(
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\nfirst"
    )
    assert (await visitor.head())[0] == b"HTTP/1.1 101 Switching Protocols"
    assert await visitor.exactly(5) == b"first"
    assert await server.exactly(5) == b"early"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(visitor.far.send_all, NOISE)
        nursery.start_soon(server.far.send_all, NOISE)
        assert await visitor.exactly(len(NOISE)) == NOISE
        assert await server.exactly(len(NOISE)) == NOISE
    await visitor.far.send_eof()
    assert await server.rest() == b""
    await server.far.send_all(b"last")
    await server.far.send_eof()
    assert await visitor.rest() == b"last"
    assert (await site.ends[0].one()).cause is Cause.FINISHED
    await trio.testing.wait_all_tasks_blocked()
    assert len(bench.over) == 1


async def test_a_refused_upgrade_is_a_response_like_any_other(bench: SitesBench) -> None:
    site = bench.site("a.example")
    visitor = bench.visit()
    await visitor.far.send_all(
        b"GET /ws HTTP/1.1\r\nHost: a.example\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    )
    await (await site.server()).far.send_all(ok(b"no"))
    await visitor.head()
    assert await visitor.exactly(2) == b"no"
    await visitor.far.send_all(GET % (b"", b"a.example"))
    await (await site.server()).far.send_all(ok(b"yes"))
    await visitor.head()
    assert await visitor.exactly(3) == b"yes"


async def test_the_host_is_rewritten_for_development_servers(bench: SitesBench) -> None:
    site = bench.site("a.example", rewrite=HostRewrite(b"localhost:5173"))
    visitor = bench.visit()
    await visitor.far.send_all(GET % (b"", b"a.example"))
    server = await site.server()
    assert (await server.head())[1] == b"Host: localhost:5173"
    await server.far.send_all(ok(b"", b"Location: http://localhost:5173/login"))
    assert b"Location: http://a.example/login" in await visitor.head()


async def test_a_site_may_answer_itself_now_or_later(bench: SitesBench) -> None:
    site = bench.site("a.example", response=ok(b"login"))
    visitor = bench.visit()
    await visitor.far.send_all(GET % (b"", b"a.example"))
    assert await visitor.response() == (b"HTTP/1.1 200 OK", b"login")
    site.verdicts = []
    await visitor.far.send_all(
        b"POST / HTTP/1.1\r\nHost: a.example\r\nContent-Length: 2\r\n\r\nhi" + GET % (b"", b"a.example")
    )
    await trio.testing.wait_all_tasks_blocked()
    site.verdicts.pop()(None)
    server = await site.server()
    await server.head()
    assert await server.exactly(2) == b"hi"
    await server.far.send_all(ok(b"welcome"))
    assert await visitor.response() == (b"HTTP/1.1 200 OK", b"welcome")
    await trio.testing.wait_all_tasks_blocked()
    site.verdicts.pop()(ok(b"no"))
    assert await visitor.response() == (b"HTTP/1.1 200 OK", b"no")


async def test_a_verdict_may_come_after_the_visitor_has_left(bench: SitesBench) -> None:
    site = bench.site("a.example", verdicts=[])
    visitor = bench.visit()
    await visitor.far.send_all(GET % (b"", b"a.example"))
    await trio.testing.wait_all_tasks_blocked()
    reset(visitor.far)
    await trio.testing.wait_all_tasks_blocked()
    assert len(bench.over) == 1
    site.verdicts[0](None)  # type: ignore[index]
    assert site.servers == []


# Hidden servers that fail


async def test_a_site_that_is_not_connected_is_a_503_and_the_connection_stays(bench: SitesBench) -> None:
    site = bench.site("a.example", is_open=False)
    visitor = bench.visit()
    for _ in range(2):
        await visitor.far.send_all(GET % (b"", b"a.example"))
        assert (await visitor.response())[0] == b"HTTP/1.1 503 Service Unavailable"
    assert site.failures == ["nobody is connected"] * 2


@pytest.mark.parametrize("response", [b"", b"HTTP/1.1 200 OK\r\n", b"nonsense\r\n\r\n", b"HTTP/1.1 101 X\r\n\r\n"])
async def test_a_server_that_does_not_answer_properly_is_a_502(bench: SitesBench, response: bytes) -> None:
    site = bench.site("a.example")
    visitor = bench.visit()
    await visitor.far.send_all(GET % (b"", b"a.example"))
    await (await site.server()).far.receive_some(65536)
    await site.servers[0].send_all(response)
    site.servers[0].socket.close()
    assert (await visitor.head())[0] == b"HTTP/1.1 502 Bad Gateway"
    assert len(site.failures) == 1


async def test_a_connection_that_the_server_closes_between_requests_is_replaced(bench: SitesBench) -> None:
    site = bench.site("a.example")
    visitor = bench.visit()
    for number in range(3):
        await visitor.far.send_all(GET % (b"", b"a.example"))
        server = (await site.server(number)).far
        await server.receive_some(65536)
        await server.send_all(ok(b"ok"))
        await visitor.head()
        await visitor.exactly(2)
        reset(server) if number else server.socket.close()
        await trio.testing.wait_all_tasks_blocked()


async def test_a_request_that_meets_a_closing_connection_is_sent_again(bench: SitesBench) -> None:
    site = bench.site("a.example")
    visitor = bench.visit()
    await visitor.far.send_all(GET % (b"1", b"a.example"))
    await (await site.server()).far.receive_some(65536)
    await site.servers[0].send_all(ok(b"ok"))
    await visitor.head()
    await visitor.exactly(2)
    await visitor.far.send_all(GET % (b"2", b"a.example"))
    await trio.testing.wait_all_tasks_blocked()
    reset(site.servers[0])  # it has the request, but did not answer
    assert (await (await site.server(1)).head())[0] == b"GET /2 HTTP/1.1"
    await site.servers[1].send_all(ok(b"ok"))
    await visitor.head()
    assert site.failures == []


async def test_a_request_with_a_body_is_not_sent_again(bench: SitesBench) -> None:
    site = bench.site("a.example")
    visitor = bench.visit()
    for number in range(2):
        await visitor.far.send_all(b"POST / HTTP/1.1\r\nHost: a.example\r\nContent-Length: 2\r\n\r\nok")
        await trio.testing.wait_all_tasks_blocked()
        if not number:
            await site.servers[0].send_all(ok(b"ok"))
            await visitor.head()
            await visitor.exactly(2)
    reset(site.servers[0])
    assert (await visitor.head())[0] == b"HTTP/1.1 502 Bad Gateway"


async def test_a_response_that_is_cut_is_a_reset(bench: SitesBench) -> None:
    site = bench.site("a.example")
    for framing in (b"Content-Length: 10", b"Transfer-Encoding: chunked"):
        visitor = bench.visit()
        await visitor.far.send_all(GET % (b"", b"a.example"))
        await trio.testing.wait_all_tasks_blocked()
        await site.servers[-1].receive_some(65536)
        await site.servers[-1].send_all(b"HTTP/1.1 200 OK\r\n%b\r\n\r\n5\r\nh" % framing)
        await visitor.head()
        site.servers[-1].socket.close()
        with pytest.raises(trio.BrokenResourceError):
            await visitor.rest()


async def test_bytes_that_were_not_asked_for_never_reach_a_visitor(bench: SitesBench) -> None:
    site = bench.site("a.example")
    visitor = bench.visit()
    await visitor.far.send_all(GET % (b"1", b"a.example"))
    await (await site.server()).far.send_all(ok(b"ok") + ok(b"poison"))
    await visitor.head()
    assert await visitor.exactly(2) == b"ok"
    await trio.testing.wait_all_tasks_blocked()
    await visitor.far.send_all(GET % (b"2", b"a.example"))
    await (await site.server(1)).far.send_all(ok(b"right"))
    await visitor.head()
    assert await visitor.exactly(5) == b"right"


async def test_a_long_response_head_is_refused(bench: SitesBench) -> None:
    site = bench.site("a.example")
    bench.limits = HttpLimits(max_head=1000)
    visitor = bench.visit()
    await visitor.far.send_all(GET % (b"", b"a.example"))
    await (await site.server()).far.send_all(b"HTTP/1.1 200 OK\r\nX: " + b"a" * 2000)
    assert (await visitor.head())[0] == b"HTTP/1.1 502 Bad Gateway"
    assert "exceeds 1000 bytes" in site.failures[0]


# Visitors that fail


async def test_a_malformed_head_is_answered_and_nothing_behind_it_read(bench: SitesBench) -> None:
    site = bench.site("a.example")
    visitor = bench.visit()
    await visitor.far.send_all(
        b"GET / HTTP/1.1\r\nHost: a.example\r\nHost: b.example\r\n\r\n" + GET % (b"", b"a.example")
    )
    assert (await visitor.head())[0] == b"HTTP/1.1 400 Bad Request"
    await visitor.rest()
    assert site.servers == []
    await visitor.far.send_eof()
    await trio.testing.wait_all_tasks_blocked()
    assert len(bench.over) == 1


async def test_a_head_may_have_max_head_bytes_and_no_more(bench: SitesBench) -> None:
    bench.limits = HttpLimits(max_head=1000)
    bench.site("a.example")
    start = b"GET / HTTP/1.1\r\nHost: a.example\r\nX: "
    for size, status in ((1000, None), (1001, b"HTTP/1.1 431 Request Header Fields Too Large")):
        visitor = bench.visit()
        await visitor.far.send_all(start + b"a" * (size - len(start) - 4) + b"\r\n\r\n")
        await trio.testing.wait_all_tasks_blocked()
        if status is None:
            assert len(bench.sites["a.example"].servers) == 1
        else:
            assert (await visitor.head())[0] == status


async def test_a_malformed_chunk_ends_the_request_at_both_sides(bench: SitesBench) -> None:
    site = bench.site("a.example")
    visitor = bench.visit()
    await visitor.far.send_all(b"POST / HTTP/1.1\r\nHost: a.example\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n")
    await trio.testing.wait_all_tasks_blocked()
    await visitor.far.send_all(b"x\r\n")
    assert (await visitor.head())[0] == b"HTTP/1.1 400 Bad Request"
    await visitor.rest()
    with pytest.raises(trio.BrokenResourceError):
        await Received(site.servers[0]).rest()


async def test_a_malformed_chunk_behind_an_answered_request_is_a_400_too(bench: SitesBench) -> None:
    site = bench.site("a.example")
    visitor = bench.visit()
    await visitor.far.send_all(GET % (b"", b"a.example"))
    await (await site.server()).far.send_all(ok(b"ok"))
    assert (await visitor.response())[1] == b"ok"
    await visitor.far.send_all(b"POST / HTTP/1.1\r\nHost: a.example\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n")
    assert (await visitor.head())[0] == b"HTTP/1.1 400 Bad Request"


async def test_a_visitor_that_breaks_off_resets_its_server(bench: SitesBench) -> None:
    site = bench.site("a.example")
    visitor = bench.visit()
    await visitor.far.send_all(b"POST / HTTP/1.1\r\nHost: a.example\r\nContent-Length: 5\r\n\r\nhel")
    await trio.testing.wait_all_tasks_blocked()
    await visitor.far.send_eof()
    with pytest.raises(trio.BrokenResourceError):
        await Received(site.servers[0]).rest()
    assert len(bench.over) == 1


async def test_a_visitor_that_half_closes_behind_its_request_gets_the_response(bench: SitesBench) -> None:
    site = bench.site("a.example")
    visitor = bench.visit()
    await visitor.far.send_all(GET % (b"", b"a.example"))
    await visitor.far.send_eof()
    await (await site.server()).far.send_all(ok(b"hello"))
    assert b"Connection: close" in await visitor.head()
    assert await visitor.rest() == b"hello"


async def test_requests_in_front_of_a_half_close_are_all_answered(bench: SitesBench) -> None:
    site = bench.site("a.example")
    visitor = bench.visit()
    await visitor.far.send_all(b"".join(GET % (b"%d" % number, b"a.example") for number in range(3)))
    await visitor.far.send_eof()
    server = await site.server()
    for number in range(3):
        assert (await server.head())[0] == b"GET /%d HTTP/1.1" % number
        await server.far.send_all(ok(b"%d" % number))
        head = await visitor.head()
        assert (b"Connection: close" in head) == (number == 2)
        assert await visitor.exactly(1) == b"%d" % number
    assert await visitor.rest() == b""


async def test_a_half_close_behind_an_incomplete_request_ends_the_connection(bench: SitesBench) -> None:
    site = bench.site("a.example")
    visitor = bench.visit()
    await visitor.far.send_all(GET % (b"1", b"a.example") + b"GET /2 HTT")
    await visitor.far.send_eof()
    await (await site.server()).far.send_all(ok(b"hello"))
    assert (await visitor.response())[1] == b"hello"
    assert await visitor.rest() == b""


async def test_a_body_that_waits_for_its_server_survives_a_half_close(bench: SitesBench) -> None:
    site = bench.site("a.example", is_waiting=True)
    visitor = bench.visit()
    await visitor.far.send_all(b"POST / HTTP/1.1\r\nHost: a.example\r\nContent-Length: 5\r\n\r\nhello")
    await visitor.far.send_eof()
    await trio.testing.wait_all_tasks_blocked()
    site.connect(site.streams[0])
    server = await site.server()
    await server.head()
    assert await server.exactly(5) == b"hello"
    await server.far.send_all(ok(b"done"))
    await visitor.head()
    assert await visitor.rest() == b"done"


@pytest.mark.parametrize("half_closed", [True, False])
async def test_a_slow_visitor_gets_the_end_of_the_last_response(
    bench: SitesBench, autojump_clock: MockClock, half_closed: bool
) -> None:
    """It reads a part a second, and needs far longer than `CLOSING_SECONDS`."""
    site = bench.site("a.example")
    visitor = bench.visit(SO_RCVBUF=4096, SO_SNDBUF=4096)
    await visitor.far.send_all(b"GET / HTTP/1.1\r\nHost: a.example\r\nConnection: close\r\n\r\n")
    if half_closed:
        await visitor.far.send_eof()
    body = NOISE[:50_000]  # one buffer, so that the relay has all of it at once
    await (await site.server()).far.send_all(ok(body))
    await visitor.head()
    received = bytearray(visitor.data)
    while chunk := await visitor.far.receive_some(2048):
        received += chunk
        await trio.sleep(1)
    assert received == body


async def test_a_visitor_that_stops_reading_the_last_response_is_reset_in_the_end(
    bench: SitesBench, autojump_clock: MockClock
) -> None:
    site = bench.site("a.example")
    visitor = bench.visit(SO_RCVBUF=4096, SO_SNDBUF=4096)
    await visitor.far.send_all(b"GET / HTTP/1.1\r\nHost: a.example\r\nConnection: close\r\n\r\n")
    body = NOISE[:40_000]
    await (await site.server()).far.send_all(ok(body))
    began = trio.current_time()
    while not bench.over:  # noqa: ASYNC110 - virtual time
        await trio.sleep(1)
    assert trio.current_time() - began >= 30
    with pytest.raises(trio.BrokenResourceError):
        await visitor.rest()


async def test_a_visitor_in_a_long_response_that_leaves_is_noticed(bench: SitesBench) -> None:
    site = bench.site("a.example")
    visitor = bench.visit()
    await visitor.far.send_all(GET % (b"", b"a.example"))
    await (await site.server()).far.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello")
    await visitor.head()
    reset(visitor.far)
    with pytest.raises(trio.BrokenResourceError):
        await Received(site.servers[0]).rest()


async def test_a_slow_visitor_stops_its_server(bench: SitesBench) -> None:
    site = bench.site("a.example")
    visitor = bench.visit(SO_RCVBUF=4096, SO_SNDBUF=4096)
    await visitor.far.send_all(GET % (b"", b"a.example"))
    await trio.testing.wait_all_tasks_blocked()
    server = site.servers[0]
    size = 64 << 20
    await server.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
    await visitor.head()
    with trio.move_on_after(0.2) as stopped:
        for _ in range(size // len(NOISE)):
            await server.send_all(NOISE)
    assert stopped.cancelled_caught


# Timeouts


@pytest.mark.parametrize(("sent", "seconds", "status"), [(b"GET /", 10, b"408"), (b"", 10, b"")])
async def test_an_incomplete_head_has_a_deadline(
    bench: SitesBench, autojump_clock: MockClock, sent: bytes, seconds: float, status: bytes
) -> None:
    visitor = bench.visit()
    await visitor.far.send_all(sent)
    began = trio.current_time()
    answer = await visitor.rest()
    assert answer[9:12] == status
    assert trio.current_time() - began == pytest.approx(seconds, abs=0.2)


async def test_the_head_of_a_later_request_has_a_deadline_from_its_first_byte_on(
    bench: SitesBench, autojump_clock: MockClock
) -> None:
    site = bench.site("a.example")
    visitor = bench.visit()
    await visitor.far.send_all(GET % (b"", b"a.example"))
    await (await site.server()).far.send_all(ok(b"ok"))
    await visitor.response()
    await trio.sleep(30)
    began = trio.current_time()
    await visitor.far.send_all(b"GET")
    assert (await visitor.rest())[9:12] == b"408"
    assert trio.current_time() - began == pytest.approx(10, abs=0.2)


async def test_a_connection_is_kept_between_requests_for_a_time(bench: SitesBench, autojump_clock: MockClock) -> None:
    site = bench.site("a.example")
    visitor = bench.visit()
    await visitor.far.send_all(GET % (b"", b"a.example"))
    await (await site.server()).far.send_all(ok(b"ok"))
    await visitor.head()
    await visitor.exactly(2)
    began = trio.current_time()
    assert await visitor.rest() == b""
    assert trio.current_time() - began == pytest.approx(75, abs=0.2)


async def test_a_response_may_have_a_deadline(bench: SitesBench, autojump_clock: MockClock) -> None:
    bench.limits = dataclasses.replace(bench.limits, response_timeout=20.0)
    site = bench.site("a.example")
    visitor = bench.visit()
    await visitor.far.send_all(GET % (b"", b"a.example"))
    assert (await visitor.head())[0] == b"HTTP/1.1 504 Gateway Timeout"
    assert site.failures == ["no response within 20 s (names.response_timeout)"]


async def test_without_one_a_long_poll_waits(bench: SitesBench, autojump_clock: MockClock) -> None:
    site = bench.site("a.example")
    visitor = bench.visit()
    await visitor.far.send_all(GET % (b"", b"a.example"))
    await trio.sleep(3)
    await (await site.server()).far.send_all(ok(b"ok"))
    await visitor.head()
