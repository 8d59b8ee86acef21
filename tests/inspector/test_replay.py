"""Requests are sent again, to a real local server, and to no other place."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest
import trio

from tests.agent.support import local_server
from tests.inspector.support import recorded
from tests.support.peers import PATIENCE
from tunneld.errors import LimitReachedError, UsageError
from tunneld.inspector import replay
from tunneld.inspector.recorder import Recorder
from tunneld.inspector.records import Exchange
from tunneld.inspector.replay import MAX_AT_ONCE, MAX_BODY, Edits, Replayer, ReplayTarget
from tunneld.net.endpoint import Target
from tunneld.wire.proxy_protocol import encode_v2

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nagain"


def original(target: bytes = b"/x?token=t", size: bytes = b"3", body: bytes = b"abc") -> tuple[Exchange, Recorder]:
    made = recorded(
        b"POST %b HTTP/1.1\r\nHost: blog\r\nCookie: sid=9\r\nTE: trailers\r\nContent-Length: %b\r\n\r\n%b"
        % (target, size, body),
        OK,
    )
    return made.all[0], Recorder(made.store)


class Server:
    """A local server that notes requests and answers them."""

    def __init__(self, answer: bytes = OK) -> None:
        self.heard = b""
        self.answer = answer

    async def serve(self, stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError):
            self.heard = await stream.receive_some()
            await stream.send_all(self.answer)
            await stream.aclose()


def to(target: Target, *, proxy_header: bool = False) -> ReplayTarget:
    async def dial() -> socket.socket:
        made = socket.create_connection((target.host, target.port))
        made.setblocking(False)
        return made

    return ReplayTarget(dial, f"http://{target}", proxy_header)


@asynccontextmanager
async def serving(server: Server) -> AsyncIterator[ReplayTarget]:
    with trio.fail_after(PATIENCE):
        async with local_server(server.serve) as target:
            yield to(target)


async def again(exchange: Exchange, recorder: Recorder, edits: Edits, server: ReplayTarget) -> Exchange:
    await Replayer(recorder).replay(exchange, edits, server)
    while recorder._backlog:
        recorder.parse_slice()
    *_, last = recorder.store
    return last


async def test_as_it_was() -> None:
    exchange, recorder = original()
    async with serving(server := Server()) as target:
        made = await again(exchange, recorder, Edits(), target)
    assert server.heard == (
        b"POST /x?token=t HTTP/1.1\r\nHost: blog\r\nCookie: sid=9\r\nConnection: close\r\nContent-Length: 3\r\n\r\nabc"
    )
    assert (made.replay_of, made.visitor) == (exchange.id, "inspector")
    assert made.response is not None
    assert bytes(made.response.body) == b"again"
    assert made.ended is not None


async def test_with_edits_and_redacted_secrets() -> None:
    exchange, recorder = original()
    headers = [
        ("Cookie", "sid=[redacted]"),
        ("X-New", "1"),
        ("Content-Length", "999"),
        ("Transfer-Encoding", "chunked"),
    ]
    edits = Edits("PUT", "/y?token=[redacted]&n=1", headers, b"longer")
    async with serving(server := Server()) as target:
        await again(exchange, recorder, edits, target)
    assert server.heard == (
        b"PUT /y?token=t&n=1 HTTP/1.1\r\nHost: blog\r\nCookie: sid=9\r\nX-New: 1\r\nConnection: close\r\n"
        b"Content-Length: 6\r\n\r\nlonger"
    )


async def test_with_a_proxy_header_where_the_server_expects_one() -> None:
    exchange, recorder = original()
    server = Server()
    with trio.fail_after(PATIENCE):
        async with local_server(server.serve) as target:
            made = await again(exchange, recorder, Edits(), to(target, proxy_header=True))
    assert server.heard.startswith(encode_v2(None, None) + b"POST /x?token=t HTTP/1.1\r\n")
    assert made.request is not None


@pytest.mark.parametrize(
    ("edits", "reason"),
    [
        (Edits(method="A B"), "not a method"),
        (Edits(method="CONNECT"), "not a method"),
        (Edits(target="x"), "must begin with /"),
        (Edits(target="/a b"), "without spaces"),
        (Edits(target="/a\r\nX: y"), "without spaces"),
        (Edits(target="/" + "a" * 9000), "at most"),
        (Edits(headers=[("A", "b\r\nX: y")]), "no valid request"),
        (Edits(headers=[("A b", "c")]), "no valid request"),
        (Edits(headers=[("A", "€")]), "ISO 8859-1"),
        (Edits(headers=[("Host", "a"), ("Host", "b")]), "no valid request"),
        (Edits(headers=[("Cookie", "other=[redacted]")]), "reveal the secrets"),
        (Edits(target="/?secret=[redacted]"), "reveal the secrets"),
        (Edits(body=bytes(MAX_BODY + 1)), "exceeds"),
    ],
)
async def test_edits_that_are_refused(edits: Edits, reason: str) -> None:
    exchange, recorder = original()
    async with serving(server := Server()) as target:
        with pytest.raises(UsageError, match=reason):
            await Replayer(recorder).replay(exchange, edits, target)
    assert server.heard == b""


async def test_the_largest_body_is_sent() -> None:
    exchange, recorder = original()
    async with serving(Server()) as target:
        made = await again(exchange, recorder, Edits(body=bytes(MAX_BODY)), target)
    assert made.request is not None
    assert made.request.size == MAX_BODY


async def test_a_body_that_is_not_kept_is_not_sent_in_part() -> None:
    exchange, recorder = original(size=b"10")
    async with serving(server := Server()) as target:
        with pytest.raises(UsageError, match="only 3 of 3 bytes of its body are kept"):
            await Replayer(recorder).replay(exchange, Edits(), target)
        await again(exchange, recorder, Edits(body=b"new"), target)
    assert server.heard.endswith(b"\r\n\r\nnew")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"garbage\r\n\r\n", "not valid"),
        (b"", "not valid"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nab", "not valid"),
    ],
)
async def test_a_server_that_answers_badly(answer: bytes, reason: str) -> None:
    exchange, recorder = original()
    async with serving(Server(answer)) as target:
        with pytest.raises(UsageError, match=reason):
            await Replayer(recorder).replay(exchange, Edits(), target)


async def test_a_server_that_is_not_there_or_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    exchange, recorder = original()

    async def say_nothing(_stream: trio.SocketStream) -> None:
        await trio.sleep_forever()

    async with local_server(say_nothing) as target:
        monkeypatch.setattr(replay, "TIMEOUT", 0.01)
        with pytest.raises(UsageError, match="has not answered within"):
            await Replayer(recorder).replay(exchange, Edits(), to(target))
    with pytest.raises(UsageError, match="could not connect to the local server"):
        await Replayer(recorder).replay(exchange, Edits(), to(target))
    recorder.parse_slice()
    assert recorder.connections == 0


async def test_a_limited_number_at_once() -> None:
    exchange, recorder = original()
    replayer = Replayer(recorder)
    replayer._running = MAX_AT_ONCE
    with pytest.raises(LimitReachedError):
        await replayer.replay(exchange, Edits(), to(Target("127.0.0.1", 1)))
