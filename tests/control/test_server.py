"""The line face over real sockets: what it says to people who behave."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio
from structlog.testing import capture_logs

from tests.support.control import Person, running_server
from tests.support.people import connect
from tunneld import __version__

GREETING = f"OK tunneld {__version__} protocol=1 auth=none"
LONG = 1e6
"""Seconds of a clock that the test moves by hand."""


async def test_it_greets() -> None:
    async with running_server() as server, await connect(server.endpoint) as stream:
        assert await Person(stream).hears() == GREETING


async def test_it_answers_with_items_and_a_verdict() -> None:
    async with running_server() as server, server.person() as person:
        await person.types("list 2")
        assert [await person.hears() for _ in range(3)] == ['* id=t0 name="a b"', '* id=t1 name="a b"', "OK 2 tunnels"]


async def test_a_long_list_arrives_whole() -> None:
    async with running_server() as server, server.person() as person:
        await person.types("list 5000\nquit")
        items = [f'* id=t{number} name="a b"' for number in range(5000)]
        assert await person.hears_all() == [*items, "OK 5000 tunnels", "OK bye"]


@pytest.mark.parametrize("line", [b"echo hi\n", b"ECHO hi\r\n", b"\n\r\n  \necho 'hi'\n"])
async def test_it_reads_what_people_type(line: bytes) -> None:
    async with running_server() as server, server.person() as person:
        await person.types(line)
        assert await person.hears() == "OK hi"


async def test_a_request_may_come_octet_by_octet() -> None:
    async with running_server() as server, server.person() as person:
        for octet in b"echo slow\r\n":
            await person.types(bytes([octet]))
        assert await person.hears() == "OK slow"


async def test_a_refusal_has_its_code_and_the_connection_goes_on() -> None:
    async with running_server() as server, server.person() as person:
        assert await person.asks("show t9") == "ERR no-such-tunnel no tunnel t9"
        assert await person.asks("echo on") == "OK on"


async def test_a_bug_is_logged_once_told_without_secrets_and_the_connection_goes_on() -> None:
    async with running_server() as server, server.person() as person:
        with capture_logs() as logs:
            assert await person.asks("bug") == "ERR internal bug failed inside the relay; its log says why"
        assert [(log["log_level"], log["verb"]) for log in logs] == [("error", "bug")]
        assert await person.asks("echo on") == "OK on"


async def test_an_item_that_cannot_be_said_is_our_bug_and_closes_its_stream() -> None:
    async with running_server() as server, server.person() as person:
        assert (await person.asks("unspeakable")).startswith("ERR internal")
        assert await person.asks("echo on") == "OK on"
        assert server.script.streams == 0  # it was closed before it began


async def test_pipelined_requests_are_answered_in_order() -> None:
    async with running_server() as server, server.person() as person:
        await person.types("".join(f"echo {number}\n" for number in range(500)).encode())
        assert [await person.hears() for _ in range(500)] == [f"OK {number}" for number in range(500)]


async def test_who_asks_is_told_to_the_command() -> None:
    async with running_server(host="") as server, server.person() as person:
        await person.asks("echo")
        (caller,) = server.script.callers
        (ours,) = [f"127.0.0.1:{stream_port(person)}"]
        assert (caller.host, caller.owner, caller.local_host) == ("127.0.0.1", ours, "127.0.0.1")


def stream_port(person: Person) -> int:
    assert isinstance(person.stream, trio.SocketStream)
    return int(person.stream.socket.getsockname()[1])


async def test_quit_ends_the_connection() -> None:
    async with running_server() as server, server.person() as person:
        await person.types("quit\necho never\n")
        assert await person.hears_all() == ["OK bye"]


async def test_somebody_who_ends_first_still_hears_all_answers() -> None:
    async with running_server() as server, await connect(server.endpoint) as stream:
        await stream.send_all(b"echo one\nlist 3000\necho two\n")
        await stream.send_eof()
        verdicts = [line for line in await Person(stream).hears_all() if not line.startswith("*")]
        assert verdicts == [GREETING, "OK one", "OK 3000 tunnels", "OK two"]


async def test_an_unfinished_last_line_is_not_carried_out() -> None:
    async with running_server() as server, server.person() as person:
        assert isinstance(person.stream, trio.SocketStream)
        await person.types(b"close t1")  # of "close t12", perhaps
        await person.stream.send_eof()
        assert await person.hears_all() == []
        assert server.script.asked == []


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
