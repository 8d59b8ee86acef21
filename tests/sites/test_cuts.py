"""Connections that are cut at every byte: a part of a message is never taken for all of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import trio

from tests.engine.bench import reset
from tests.sites.conftest import Received, SitesBench
from tests.support.named import Response, ResponseReader, TruncatedError

BODY = b"0123456789"
RESPONSES = {
    "known length": b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n" + BODY,
    "chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\n0123\r\n6\r\n456789\r\n0\r\nX: 1\r\n\r\n",
    "until the end": b"HTTP/1.1 200 OK\r\n\r\n" + BODY,
    "interim": b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n" + BODY,
    "no body": b"HTTP/1.1 204 No Content\r\nX: 1\r\n\r\n",
}
REQUESTS = {
    "no body": b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n",
    "known length": b"POST / HTTP/1.1\r\nHost: a.example\r\nContent-Length: 10\r\n\r\n" + BODY,
    "chunked": (
        b"POST / HTTP/1.1\r\nHost: a.example\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"4\r\n0123\r\n6\r\n456789\r\n0\r\nX: 1\r\n\r\n"
    ),
}
CUTS: dict[str, Callable[[trio.SocketStream], None]] = {
    "end of file": lambda stream: stream.socket.close(),
    "reset": reset,
}


async def outcome(stream: trio.SocketStream) -> Response | str:
    """What a strict client makes of a response."""
    try:
        response = await ResponseReader(stream).response()
    except TruncatedError:
        return "truncated"
    return response if response is not None else "nothing"


async def all_over(bench: SitesBench) -> None:
    """Every visitor's connection, and every relay, has ended."""
    for visitor in bench.far:
        visitor.socket.close()
    await trio.testing.wait_all_tasks_blocked()
    assert len(bench.over) == len(bench.connections)
    for site in bench.sites.values():
        for server in site.servers:
            server.socket.close()
        await trio.testing.wait_all_tasks_blocked()
        for ends in site.ends:
            await ends.one()


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("framing", RESPONSES)
async def test_a_server_that_is_cut_off(bench: SitesBench, framing: str, cut: str) -> None:
    site, data = bench.site("a.example"), RESPONSES[framing]
    for at in range(len(data) + 1):
        visitor = bench.visit()
        await visitor.far.send_all(REQUESTS["no body"])
        await trio.testing.wait_all_tasks_blocked()
        server = site.servers[-1]
        await server.receive_some(65536)
        await server.send_all(data[:at])
        await trio.testing.wait_all_tasks_blocked()  # else the reset takes the bytes along
        CUTS[cut](server)
        found = await outcome(visitor.far)
        begun = at >= data.rindex(b"\r\n\r\n") + 4 if framing != "chunked" else at >= data.index(b"\r\n\r\n") + 4
        if at == len(data) and (framing, cut) != ("until the end", "reset"):
            assert isinstance(found, Response)
            assert (found.status, found.body) == ((204, b"") if framing == "no body" else (200, BODY))
        elif not begun:
            assert isinstance(found, Response)
            assert found.status == 502
        elif (framing, cut) == ("until the end", "end of file"):  # HTTP cannot tell this from a complete response
            assert isinstance(found, Response)
            assert found.body == BODY[: at - len(data)]
        else:
            assert found == "truncated"
    await all_over(bench)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("form", REQUESTS)
async def test_a_visitor_that_is_cut_off(bench: SitesBench, form: str, cut: str) -> None:
    site, data = bench.site("a.example"), REQUESTS[form]
    head_size = data.index(b"\r\n\r\n") + 4
    for at in range(len(data)):
        before = len(site.servers)
        visitor = bench.visit()
        await visitor.far.send_all(data[:at])
        await trio.testing.wait_all_tasks_blocked()
        CUTS[cut](visitor.far)
        await trio.testing.wait_all_tasks_blocked()
        assert len(site.servers) - before == (at >= head_size)
        if at >= head_size:
            server = Received(site.servers[-1])
            with pytest.raises(trio.BrokenResourceError):
                await server.rest()
            received = bytes(server.data)
            assert not received.endswith((b"\r\n0\r\nX: 1\r\n\r\n", BODY))
    await all_over(bench)


@pytest.mark.parametrize("framing", RESPONSES)
async def test_a_response_in_two_pieces_is_the_same(bench: SitesBench, framing: str) -> None:
    """At every byte, on one connection, which is kept."""
    site, data = bench.site("a.example"), RESPONSES[framing]
    visitor = bench.visit()
    reader = ResponseReader(visitor.far)
    for at in range(1, len(data)):
        if framing == "until the end":
            visitor = bench.visit()
            reader = ResponseReader(visitor.far)
        await visitor.far.send_all(REQUESTS["no body"])
        await trio.testing.wait_all_tasks_blocked()
        server = site.servers[-1]
        await server.receive_some(65536)
        for piece in (data[:at], data[at:]):
            await server.send_all(piece)
            await trio.testing.wait_all_tasks_blocked()
        if framing == "until the end":
            server.socket.close()
        response = await reader.response()
        assert response is not None
        assert response.body == (b"" if framing == "no body" else BODY)
    assert len(site.servers) == (1 if framing != "until the end" else len(data) - 1)


@pytest.mark.parametrize(("form", "framing"), list(itertools.product(REQUESTS, ["known length", "chunked"])))
async def test_a_request_in_two_pieces_is_the_same(bench: SitesBench, form: str, framing: str) -> None:
    site, data = bench.site("a.example"), REQUESTS[form]
    visitor = bench.visit()
    reader = ResponseReader(visitor.far)
    for at in range(1, len(data)):
        for piece in (data[:at], data[at:]):
            await visitor.far.send_all(piece)
            await trio.testing.wait_all_tasks_blocked()
        server = await site.server()
        await server.head()
        rest = data[data.index(b"\r\n\r\n") + 4 :]
        assert await server.exactly(len(rest)) == rest
        await site.servers[0].send_all(RESPONSES[framing])
        response = await reader.response()
        assert response is not None
        assert response.body == BODY
    assert len(site.servers) == 1
