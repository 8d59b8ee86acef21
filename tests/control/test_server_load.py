"""Slow, silent, many and vanished peers, and a shortage of descriptors."""

from __future__ import annotations

import os
import resource
import socket

import trio
from structlog.testing import capture_logs
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.support.control import LineClient, running_server
from tests.support.peers import connect, is_dropped, is_refused, reset
from tunneld import __version__
from tunneld.config.schema import ControlSettings
from tunneld.net import sockets

GREETING = f"OK tunneld {__version__} protocol=1 opens=described tunnels=shared auth=none"
LONG = 1e6
"""Timeout of a test in seconds of a mock clock, which the test advances by hand."""


async def test_silent_connections_delay_no_other_client() -> None:
    async with running_server() as server:
        silent = [await connect(server.endpoint) for _ in range(50)]
        assert await server.is_serving()
        for stream in silent:
            await stream.aclose()


async def test_over_max_connections_a_client_is_refused_with_the_reason() -> None:
    async with running_server(ControlSettings(max_connections=2)) as server:
        with capture_logs() as logs:
            async with server.client(), server.client() as second:
                for _ in range(3):
                    async with await connect(server.endpoint) as stream:
                        assert await LineClient(stream).read_all() == [
                            "ERR limit 2 of 2 control connections are open (control.max_connections); try again later"
                        ]
                assert await second.request("quit") == "OK bye"
                assert await second.read_line() == ""
                assert await server.is_serving()
        assert [log["log_level"] for log in logs if log["log_level"] != "debug"] == ["warning"]  # logged once


async def test_a_reload_applies_to_a_running_server() -> None:
    async with running_server(ControlSettings(max_connections=1)) as server, server.client():
        server.settings = ControlSettings(max_connections=2)
        assert await server.is_serving()


async def test_an_idle_connection_is_closed_with_the_reason(mock_clock: MockClock) -> None:
    async with running_server(ControlSettings(idle_timeout=600.0), timeout=LONG) as server, server.client() as client:
        await wait_all_tasks_blocked()
        mock_clock.jump(601)
        assert await client.read_all() == ["ERR limit no request for 600 s (control.idle_timeout); connect again"]


async def test_dripping_bytes_is_idling(mock_clock: MockClock) -> None:
    async with running_server(ControlSettings(idle_timeout=600.0), timeout=LONG) as server, server.client() as client:
        for _ in range(3):
            await client.send(b"x")
            await wait_all_tasks_blocked()
            mock_clock.jump(201)
        assert (await client.read_line()).startswith("ERR limit")


async def test_an_empty_line_keeps_a_connection_alive(mock_clock: MockClock) -> None:
    async with running_server(ControlSettings(idle_timeout=600.0), timeout=LONG) as server, server.client() as client:
        for _ in range(5):
            await client.send("")
            await wait_all_tasks_blocked()
            mock_clock.jump(599)
        assert await client.request("echo alive") == "OK alive"


async def test_a_watch_is_not_idle(mock_clock: MockClock) -> None:
    async with running_server(timeout=LONG) as server, server.client() as client:
        await client.send("watch")
        assert [(await client.read_line()).split("=")[1] for _ in range(3)] == ["watching", "opened id", "closed id"]
        await wait_all_tasks_blocked()
        mock_clock.jump(LONG / 2)
        assert await client.request("") == "OK watched"


async def test_a_client_that_sends_without_reading_is_throttled_and_closed(mock_clock: MockClock) -> None:
    async with running_server(ControlSettings(write_timeout=30.0), timeout=LONG) as server, server.client() as client:

        async def flood() -> None:
            try:
                while True:
                    await client.send(b"list 100\n" * 400)
            except trio.BrokenResourceError:
                return

        async with trio.open_nursery() as nursery:
            nursery.start_soon(flood)
            await wait_all_tasks_blocked(0.01)
            asked = len(server.script.requests)
            await wait_all_tasks_blocked(0.01)
            assert len(server.script.requests) == asked  # the server does not read requests that it cannot answer
            assert await server.is_serving()
            mock_clock.jump(31)
            await wait_all_tasks_blocked(0.01)
        assert await server.is_serving()
    assert len(server.script.requests) <= asked + 2


async def test_a_slow_reader_of_a_long_list_is_served_while_it_reads(mock_clock: MockClock) -> None:
    async with running_server(ControlSettings(write_timeout=30.0), timeout=LONG) as server, server.client() as client:
        assert isinstance(client.stream, trio.SocketStream)
        client.stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
        await client.send("list 200000")
        received = b""
        for _ in range(20):  # 400 s in all, and less than 30 s without a read
            await wait_all_tasks_blocked(0.005)
            mock_clock.jump(20)
            received += await client.stream.receive_some(65_536)
        while not received.endswith(b"\nOK 200000 tunnels\n"):
            chunk = await client.stream.receive_some(1_000_000)
            assert chunk
            received = received[-100:] + chunk


async def test_a_client_that_stops_reading_is_closed(mock_clock: MockClock) -> None:
    async with running_server(ControlSettings(write_timeout=30.0), timeout=LONG) as server, server.client() as client:
        await client.send("list 500000")
        await wait_all_tasks_blocked(0.01)
        mock_clock.jump(31)
        assert (await client.read_all())[-1].startswith("*")


async def test_a_reset_at_any_point_releases_the_connection() -> None:
    async with running_server(ControlSettings(max_connections=3)) as server:
        with capture_logs() as logs:
            for text in (b"", b"x", b"list 100000\n" * 5, b"watch\n", b"GET / HTTP/1.1\n", b"x" * 10_000):
                stream = await connect(server.endpoint)
                await stream.send_all(text)
                reset(stream)
                await wait_all_tasks_blocked(0.005)
                assert await server.is_serving()
        assert {log["log_level"] for log in logs} <= {"debug", "info"}


async def test_a_shortage_of_descriptors_is_logged_once_and_recovered_from(mock_clock: MockClock) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with running_server(timeout=LONG) as server, server.client() as friend:
        with socket.socket() as late, capture_logs() as logs:
            os.close(lowest_free := os.dup(0))
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
            try:
                late.setblocking(False)
                late.connect_ex((server.endpoint.host, server.endpoint.port))
                for _ in range(5):
                    await wait_all_tasks_blocked(0.005)
                    mock_clock.jump(0.2)
                assert await friend.request("echo still here") == "OK still here"
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            await wait_all_tasks_blocked(0.005)
            mock_clock.jump(0.2)
            assert await server.is_serving()
        problems = [(log["event"], log["reason"]) for log in logs if log["log_level"] != "debug"]
        assert problems == [("could not accept control connections", "too many open files")]


async def test_stopping_closes_every_connection() -> None:
    before = sockets.open_descriptors()
    async with running_server() as server:
        async with server.client() as one, server.client() as two:
            await two.send("watch")
            assert await two.read_line() == "* event=watching"
            server.scope.cancel()
            assert await one.read_line() == ""
            await two.read_all()
        assert await is_refused(server.endpoint)
        assert (server.script.streams, server.script.streams_closed) == (1, 1)
    assert sockets.open_descriptors() == before


async def test_the_request_that_stops_the_daemon_is_answered() -> None:
    async with running_server() as server, server.client() as client:
        assert await client.request("shutdown") == "OK stopping"
        assert isinstance(client.stream, trio.SocketStream)
        assert await is_dropped(client.stream)
