"""Requests that follow each other without waiting for the answers: no bytes of a peer are a bug of ours."""

from __future__ import annotations

import random
import re

import pytest
import structlog
import trio

from tests.http.support import HttpRelay, running_http
from tests.support.credentials import authenticator_of, credential
from tests.support.peers import PATIENCE

HOST = b"Host: 127.0.0.1\r\n"
WEBSOCKET = (
    b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
)
LOOK = b"GET /healthz HTTP/1.1\r\n" + HOST
CALL = b"POST /RPC2 HTTP/1.1\r\nContent-Type: text/xml\r\n" + HOST
EXPECT = b"Expect: 100-continue\r\n"
CLOSE = b"Connection: close\r\n"
END = b"\r\n"

PIECES = (
    LOOK + END,
    LOOK + CLOSE + END,
    LOOK + CLOSE + EXPECT + END,
    LOOK + WEBSOCKET + END,
    LOOK + WEBSOCKET + EXPECT + END,
    LOOK + EXPECT + b"Connection: upgrade\r\nUpgrade: h2c\r\n" + END,
    CALL + EXPECT + b"Content-Length: 5\r\n" + END,
    CALL + EXPECT + b"Content-Length: 5\r\nAuthorization: Basic QTpC\r\n" + END,
    CALL + EXPECT + b"Transfer-Encoding: chunked\r\n" + END,
    CALL + WEBSOCKET + b"Content-Length: 5\r\n" + END,
    b"CONNECT relay:1 HTTP/1.1\r\n" + HOST + EXPECT + END,
    b"hello",
    b"5\r\nhello\r\n",
    b"0\r\n\r\n",
    b"zz\r\n",
    b"x" * 70_000,
)


async def exchange(relay: HttpRelay, sent: bytes, dice: random.Random | None = None) -> bytes:
    """Send bytes, in pieces if there are dice, then an end of file; returns all that the relay answers."""
    received = bytearray()

    async def send(stream: trio.SocketStream) -> None:
        rest = sent
        try:
            while rest:
                size = dice.randrange(1, len(rest) + 1) if dice else len(rest)
                await stream.send_all(rest[:size])
                rest = rest[size:]
                for _ in range(dice.randrange(6) if dice else 0):
                    await trio.lowlevel.checkpoint()
            await stream.send_eof()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass

    with trio.fail_after(PATIENCE):
        async with await relay.connect() as stream, trio.open_nursery() as nursery:
            nursery.start_soon(send, stream)
            try:
                async for chunk in stream:
                    received += chunk
            except trio.BrokenResourceError:  # the relay closed before it had read everything
                pass
            nursery.cancel_scope.cancel()
    return bytes(received)


def statuses(received: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1.1 (\d+)", received)]


@pytest.mark.parametrize("secured", [False, True])
async def test_any_sequence_of_requests_is_the_fault_of_the_peer(secured: bool) -> None:
    authenticator = authenticator_of(credential("alice")) if secured else None
    async with running_http(authenticator=authenticator) as relay:
        with structlog.testing.capture_logs() as logged:
            for seed in range(150):
                dice = random.Random(seed)
                await exchange(relay, b"".join(dice.choices(PIECES, k=dice.randrange(1, 6))), dice)
            assert statuses(await exchange(relay, LOOK + END)) == [200]
    assert [line for line in logged if line["log_level"] == "error"] == []


async def test_pipelined_upgrades_are_declined_and_every_request_is_answered() -> None:
    async with running_http() as relay:
        assert statuses(await exchange(relay, (LOOK + WEBSOCKET + END) * 2 + LOOK + CLOSE + END)) == [200, 200, 200]


async def test_a_malformed_request_behind_a_good_one_does_not_cost_its_answer() -> None:
    async with running_http() as relay:
        for seed in range(40):
            received = await exchange(relay, LOOK + CLOSE + END + b"zz\r\n" * 3, random.Random(seed))
            assert statuses(received) in ([200], [400]), seed


async def test_a_refused_expectation_is_answered_and_the_body_discarded() -> None:
    async with running_http(authenticator=authenticator_of(credential("alice"))) as relay:
        with structlog.testing.capture_logs() as logged:
            for body in (b"", b"hello", b"hello" * 30_000):
                size = b"Content-Length: %d\r\n" % max(5, len(body))
                assert statuses(await exchange(relay, CALL + EXPECT + size + END + body))[-1] == 401
    assert [line for line in logged if line["log_level"] == "error"] == []
