"""The ends of a watch, after each of which its stream is closed."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.support.control import LineClient, running_server
from tests.support.peers import connect, reset
from tunneld.config.schema import ControlSettings

LONG = 1e6
"""Timeout of a test in seconds of a mock clock, which the test advances by hand."""


async def watch(client: LineClient, line: str = "watch") -> None:
    await client.send(line)
    lines = [await client.read_line() for _ in range(3)]
    assert lines == ["* event=watching", "* event=opened id=t1", '* event=closed id=t1 reason="ttl is over"']


async def test_an_empty_line_ends_a_watch() -> None:
    async with running_server() as server, server.client() as client:
        await watch(client)
        assert await client.request("") == "OK watched"
        assert await client.request("echo on") == "OK on"
        assert (server.script.streams, server.script.streams_closed) == (1, 1)


async def test_a_request_ends_a_watch_and_is_executed() -> None:
    async with running_server() as server, server.client() as client:
        await watch(client)
        await client.send("echo next")
        assert [await client.read_line(), await client.read_line()] == ["OK watched", "OK next"]


async def test_a_watch_after_a_watch() -> None:
    async with running_server() as server, server.client() as client:
        await watch(client)
        await client.send("watch")
        assert await client.read_line() == "OK watched"
        assert await client.read_line() == "* event=watching"
        assert await client.request("") == "OK watched"
        assert (server.script.streams, server.script.streams_closed) == (2, 2)


async def test_pipelined_input_ends_a_watch_at_once() -> None:
    async with running_server() as server, server.client() as client:
        await client.send(b"watch\necho next\n")
        assert [await client.read_line() for _ in range(3)] == ["* event=watching", "OK watched", "OK next"]


async def test_end_of_file_ends_a_watch() -> None:
    async with running_server() as server, server.client() as client:
        await watch(client)
        assert isinstance(client.stream, trio.SocketStream)
        await client.stream.send_eof()
        assert await client.read_all() == ["OK watched"]
        assert server.script.streams_closed == 1


async def test_a_reset_ends_a_watch() -> None:
    async with running_server() as server:
        stream = await connect(server.endpoint)
        client = LineClient(stream)
        await client.read_line()
        await watch(client)
        reset(stream)
        await wait_all_tasks_blocked(0.005)
        assert server.script.streams_closed == 1


async def test_the_end_of_the_stream_ends_a_watch() -> None:
    async with running_server() as server, server.client() as client:
        await watch(client, "watch once")
        assert await client.read_line() == "OK watched"
        assert await client.request("echo on") == "OK on"


async def test_an_error_in_the_stream_is_an_error_reply() -> None:
    async with running_server() as server, server.client() as client:
        await client.send("watch-and-fail")
        assert [await client.read_line(), await client.read_line()] == [
            "* event=opened id=t1",
            "ERR no-such-tunnel no tunnel t1",
        ]
        assert await client.request("echo on") == "OK on"


@pytest.mark.parametrize("how", ["stops reading", "resets"])
async def test_a_client_lost_during_an_event_ends_its_watch(mock_clock: MockClock, how: str) -> None:
    async with running_server(ControlSettings(write_timeout=30.0), timeout=LONG) as server:
        stream = await connect(server.endpoint)
        await stream.send_all(b"watch-forever\n")
        await wait_all_tasks_blocked(0.01)
        assert (server.script.streams, server.script.streams_closed) == (1, 0)
        if how == "resets":
            reset(stream)
        else:
            mock_clock.jump(31)
        await wait_all_tasks_blocked(0.01)
        assert server.script.streams_closed == 1
        await stream.aclose()


async def test_input_never_cuts_an_event(mock_clock: MockClock) -> None:
    async with running_server(timeout=LONG) as server, server.client() as client:
        await client.send("watch-forever")
        await wait_all_tasks_blocked(0.01)  # an event is half sent by now
        await client.send("echo next")
        events, status, answer = set(), "", ""
        while not answer:
            line = await client.read_line()
            if line.startswith("*"):
                events.add(line)
            elif status:
                answer = line
            else:
                status = line
        assert events == {"* event=" + "x" * 10_000}
        assert (status, answer) == ("OK", "OK next")
