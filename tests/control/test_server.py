"""The control port over real sockets, with well-behaved clients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio
from structlog.testing import capture_logs

from tests.support.control import LineClient, running_server
from tests.support.peers import connect
from tunneld import __version__

GREETING = f"OK tunneld {__version__} protocol=1 opens=described tunnels=shared auth=none"
LONG = 1e6
"""Timeout of a test in seconds of a mock clock, which the test advances by hand."""


async def test_the_greeting() -> None:
    async with running_server() as server, await connect(server.endpoint) as stream:
        assert await LineClient(stream).read_line() == GREETING


async def test_a_reply_has_items_and_a_status_line() -> None:
    async with running_server() as server, server.client() as client:
        await client.send("list 2")
        assert [await client.read_line() for _ in range(3)] == [
            '* id=t0 name="a b"',
            '* id=t1 name="a b"',
            "OK 2 tunnels",
        ]


async def test_a_long_reply_arrives_whole() -> None:
    async with running_server() as server, server.client() as client:
        await client.send("list 5000\nquit")
        items = [f'* id=t{number} name="a b"' for number in range(5000)]
        assert await client.read_all() == [*items, "OK 5000 tunnels", "OK bye"]


@pytest.mark.parametrize("line", [b"echo hi\n", b"ECHO hi\r\n", b"\n\r\n  \necho 'hi'\n"])
async def test_line_ends_quotes_and_case_are_accepted(line: bytes) -> None:
    async with running_server() as server, server.client() as client:
        await client.send(line)
        assert await client.read_line() == "OK hi"


async def test_a_request_may_arrive_byte_by_byte() -> None:
    async with running_server() as server, server.client() as client:
        for byte in b"echo slow\r\n":
            await client.send(bytes([byte]))
        assert await client.read_line() == "OK slow"


async def test_an_error_has_its_code_and_the_connection_continues() -> None:
    async with running_server() as server, server.client() as client:
        assert await client.request("show t9") == "ERR no-such-tunnel no tunnel t9"
        assert await client.request("echo on") == "OK on"


async def test_a_bug_is_logged_once_and_reported_without_details() -> None:
    async with running_server() as server, server.client() as client:
        with capture_logs() as logs:
            assert (
                await client.request("bug")
                == "ERR internal bug failed because of a bug in the relay; see the log of the relay"
            )
        assert [(log["log_level"], log["verb"]) for log in logs] == [("error", "bug")]
        assert await client.request("echo on") == "OK on"


async def test_an_item_that_cannot_be_formatted_is_a_bug_and_closes_its_stream() -> None:
    async with running_server() as server, server.client() as client:
        assert (await client.request("unspeakable")).startswith("ERR internal")
        assert await client.request("echo on") == "OK on"
        assert server.script.streams == 0  # it was closed before it started


async def test_pipelined_requests_are_answered_in_order() -> None:
    async with running_server() as server, server.client() as client:
        await client.send("".join(f"echo {number}\n" for number in range(500)).encode())
        assert [await client.read_line() for _ in range(500)] == [f"OK {number}" for number in range(500)]


async def test_a_command_gets_the_caller() -> None:
    async with running_server(host="") as server, server.client() as client:
        await client.request("echo")
        (caller,) = server.script.callers
        (ours,) = [f"127.0.0.1:{stream_port(client)}"]
        assert (caller.host, caller.owner, caller.local_host) == ("127.0.0.1", ours, "127.0.0.1")


def stream_port(client: LineClient) -> int:
    assert isinstance(client.stream, trio.SocketStream)
    return int(client.stream.socket.getsockname()[1])


async def test_quit_ends_the_connection() -> None:
    async with running_server() as server, server.client() as client:
        await client.send("quit\necho never\n")
        assert await client.read_all() == ["OK bye"]


async def test_a_half_closed_client_gets_all_replies() -> None:
    async with running_server() as server, await connect(server.endpoint) as stream:
        await stream.send_all(b"echo one\nlist 3000\necho two\n")
        await stream.send_eof()
        statuses = [line for line in await LineClient(stream).read_all() if not line.startswith("*")]
        assert statuses == [GREETING, "OK one", "OK 3000 tunnels", "OK two"]


async def test_an_unfinished_last_line_is_not_executed() -> None:
    async with running_server() as server, server.client() as client:
        assert isinstance(client.stream, trio.SocketStream)
        await client.send(b"close t1")  # of "close t12", perhaps
        await client.stream.send_eof()
        assert await client.read_all() == []
        assert server.script.requests == []


async def test_by_hand_with_nc(program_path: Callable[[str], str]) -> None:
    nc = program_path("nc")
    async with running_server() as server:
        script = b"list 1\r\nshow t9\nquit\n"
        done = await trio.run_process(
            [nc, server.endpoint.host, str(server.endpoint.port)], stdin=script, capture_stdout=True
        )
        assert done.stdout.decode().splitlines() == [
            GREETING,
            '* id=t0 name="a b"',
            "OK 1 tunnels",
            "ERR no-such-tunnel no tunnel t9",
            "OK bye",
        ]
