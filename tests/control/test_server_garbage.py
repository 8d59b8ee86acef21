"""Garbage and other protocols on the control port end only their own connection."""

from __future__ import annotations

import random

import pytest
import trio
from structlog.testing import capture_logs

from tests.support.control import running_server
from tunneld import __version__
from tunneld.control.session import MAX_UNREADABLE_LINES
from tunneld.wire.lines import MAX_LINE

GREETING = f"OK tunneld {__version__} protocol=1 opens=described tunnels=shared auth=none"
LONG = 1e6
"""Timeout of a test in seconds of a mock clock, which the test advances by hand."""


async def test_unreadable_lines_are_refused_individually() -> None:
    async with running_server() as server, server.client() as client:
        for line in (b"\xff\n", b"a\0b\n", b"close 'x\n", b"@\n"):
            await client.send(line)
            assert (await client.read_line()).startswith("ERR usage")
        assert await client.request("echo on") == "OK on"


async def test_many_unreadable_lines_in_a_row_end_the_connection() -> None:
    async with running_server() as server, server.client() as client:
        await client.send(
            b"\xff\n" * (MAX_UNREADABLE_LINES - 1) + b"echo patience\n" + b"\xff\n" * 5 * MAX_UNREADABLE_LINES
        )
        codes = [line.split()[1] for line in await client.read_all()]
        assert codes == ["usage"] * (MAX_UNREADABLE_LINES - 1) + ["patience"] + ["usage"] * (
            MAX_UNREADABLE_LINES - 1
        ) + ["protocol"]


async def test_the_sender_of_a_huge_line_receives_the_error() -> None:
    async with running_server() as server, server.client() as client:
        await client.send(b"x" * 1_000_000)
        assert await client.read_all() == [
            f"ERR protocol line is longer than {MAX_LINE} bytes; send shorter lines, each with a line end"
        ]
        assert await server.is_serving()


async def test_lines_before_an_endless_one_are_answered() -> None:
    async with running_server() as server, server.client() as client:
        await client.send(b"echo first\n" + b"x" * 2 * MAX_LINE)
        assert [line.split()[1] for line in await client.read_all()] == ["first", "protocol"]


@pytest.mark.parametrize("seed", range(20))
async def test_binary_garbage_ends_only_its_connection(seed: int) -> None:
    generator = random.Random(seed)
    async with running_server() as server:
        with capture_logs() as logs:
            async with server.client() as client:
                await client.send(generator.randbytes(generator.choice([1, 100, 5000, 200_000])))
                assert isinstance(client.stream, trio.SocketStream)
                await client.stream.send_eof()
                assert all(line.startswith("ERR ") for line in await client.read_all())
        assert [log for log in logs if log["log_level"] == "error"] == []
        assert server.script.requests == []
        assert await server.is_serving()


HTTP = [
    b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    b"POST / HTTP/1.1\r\nContent-Type: text/plain\r\n\r\nopenTunnel\r\nquit\r\n",
    b"echo /?x HTTP/1.0\r\n\r\necho\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"POST /" + b"x" * MAX_LINE + b" HTTP/1.1\r\n\r\nopenTunnel\r\n",
]


@pytest.mark.parametrize("request_", HTTP, ids=range(len(HTTP)))
async def test_an_http_request_executes_nothing(request_: bytes) -> None:
    async with running_server() as server, server.client() as client:
        await client.send(request_)
        (line,) = await client.read_all()
        assert line.startswith("ERR protocol")
        assert server.script.requests == []


async def test_tls_on_the_plain_port_is_detected_by_its_first_byte() -> None:
    async with running_server() as server, server.client() as client:
        await client.send(b"\x16")
        assert await client.read_all() == [
            "ERR protocol this port speaks plain text, not TLS; use tcp:// or set [control.tls]"
        ]
