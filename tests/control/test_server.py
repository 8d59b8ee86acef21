"""The line face over real sockets: what it says to people who behave."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio
from structlog.testing import capture_logs

from tests.support.control import LineClient, running_server
from tests.support.people import connect
from tunneld import __version__

GREETING = f"OK tunneld {__version__} protocol=1 auth=none"
LONG = 1e6
"""Seconds of a clock that the test moves by hand."""


async def test_it_greets() -> None:
    async with running_server() as server, await connect(server.endpoint) as stream:
        assert await LineClient(stream).read_line() == GREETING


async def test_it_answers_with_items_and_a_verdict() -> None:
    async with running_server() as server, server.client() as client:
        await client.send("list 2")
        assert [await client.read_line() for _ in range(3)] == [
            '* id=t0 name="a b"',
            '* id=t1 name="a b"',
            "OK 2 tunnels",
        ]


async def test_a_long_list_arrives_whole() -> None:
    async with running_server() as server, server.client() as client:
        await client.send("list 5000\nquit")
        items = [f'* id=t{number} name="a b"' for number in range(5000)]
        assert await client.read_all() == [*items, "OK 5000 tunnels", "OK bye"]


@pytest.mark.parametrize("line", [b"echo hi\n", b"ECHO hi\r\n", b"\n\r\n  \necho 'hi'\n"])
async def test_it_reads_what_people_type(line: bytes) -> None:
    async with running_server() as server, server.client() as client:
        await client.send(line)
        assert await client.read_line() == "OK hi"


async def test_a_request_may_come_octet_by_octet() -> None:
    async with running_server() as server, server.client() as client:
        for octet in b"echo slow\r\n":
            await client.send(bytes([octet]))
        assert await client.read_line() == "OK slow"


async def test_a_refusal_has_its_code_and_the_connection_goes_on() -> None:
    async with running_server() as server, server.client() as client:
        assert await client.request("show t9") == "ERR no-such-tunnel no tunnel t9"
        assert await client.request("echo on") == "OK on"


async def test_a_bug_is_logged_once_told_without_secrets_and_the_connection_goes_on() -> None:
    async with running_server() as server, server.client() as client:
        with capture_logs() as logs:
            assert (
                await client.request("bug")
                == "ERR internal bug failed because of a bug in the relay; see the log of the relay"
            )
        assert [(log["log_level"], log["verb"]) for log in logs] == [("error", "bug")]
        assert await client.request("echo on") == "OK on"


async def test_an_item_that_cannot_be_said_is_our_bug_and_closes_its_stream() -> None:
    async with running_server() as server, server.client() as client:
        assert (await client.request("unspeakable")).startswith("ERR internal")
        assert await client.request("echo on") == "OK on"
        assert server.script.streams == 0  # it was closed before it began


async def test_pipelined_requests_are_answered_in_order() -> None:
    async with running_server() as server, server.client() as client:
        await client.send("".join(f"echo {number}\n" for number in range(500)).encode())
        assert [await client.read_line() for _ in range(500)] == [f"OK {number}" for number in range(500)]


async def test_who_asks_is_told_to_the_command() -> None:
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


async def test_somebody_who_ends_first_still_hears_all_answers() -> None:
    async with running_server() as server, await connect(server.endpoint) as stream:
        await stream.send_all(b"echo one\nlist 3000\necho two\n")
        await stream.send_eof()
        verdicts = [line for line in await LineClient(stream).read_all() if not line.startswith("*")]
        assert verdicts == [GREETING, "OK one", "OK 3000 tunnels", "OK two"]


async def test_an_unfinished_last_line_is_not_carried_out() -> None:
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
