"""Connections: kept ones, clients that do not read, strangers who do not speak HTTP, and the end."""

from __future__ import annotations

import re
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import structlog
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.http.support import Face, begin, read_answer, running_http
from tests.support.people import is_dropped
from tunneld.http import connection
from tunneld.net.sockets import bind_tcp, open_descriptors

KIB = 1024
SOON = 5.0
"""Seconds of real time in which things that take no time have happened, also on a busy machine."""

H2_HELLO = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x01\x01\x05\x00\x00\x00\x01\x00"


class TestConnections:
    async def test_a_connection_is_kept_for_the_next_request_and_closed_when_none_comes(self) -> None:
        async with running_http(keep_alive_timeout=0.2) as face, await face.connect() as stream:
            for _ in range(3):
                await stream.send_all(f"GET /healthz HTTP/1.1\r\nhost: {face.authority}\r\n\r\n".encode())
                assert (await read_answer(stream)).status == 200
            assert await is_dropped(stream)

    async def test_requests_on_the_heels_of_each_other_are_answered_in_turn(self) -> None:
        async with running_http() as face, await face.connect() as stream:
            ends = f" HTTP/1.1\r\nhost: {face.authority}\r\n"
            requests = f"GET /nothing{ends}\r\nGET /healthz{ends}\r\nGET /api/v1/list{ends}connection: close\r\n\r\n"
            await stream.send_all(requests.encode())
            received = b"".join([chunk async for chunk in stream])
            assert re.findall(rb"HTTP/1.1 (\d+)", received) == [b"404", b"200", b"200"]

    @pytest.mark.parametrize("start", [b"", b"GET /healthz HTTP/1.1\r\nhost: x"])
    async def test_a_head_that_never_ends_costs_its_connection(self, start: bytes) -> None:
        async with running_http(keep_alive_timeout=0.05) as face, await face.connect() as stream:
            await stream.send_all(start)
            assert await is_dropped(stream)

    @pytest.mark.parametrize(
        "said",
        [
            b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1",  # a TLS greeting
            b"SSH-2.0-OpenSSH_9.2\r\n",
            b"openTunnel tcp\r\n\r\n",
            b"GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n",
            b"GET / HTTP/1.1\r\n\r\n",
            b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n",
            b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
            b"GET / HTTP/1.1\r\nhost: x\r\nx: " + b"a" * 40_000 + b"\r\n\r\n",
            b"GET /\xff HTTP/1.1\r\nhost: x\r\n\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 100,
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + H2_HELLO,
        ],
    )
    async def test_strangers_cost_their_own_connection_and_nothing_else(self, said: bytes) -> None:
        async with running_http(keep_alive_timeout=0.05) as face:
            async with await face.connect() as stream:
                await stream.send_all(said)
                await stream.send_eof()
                received = b"".join([chunk async for chunk in stream])
                assert b"200" not in received
                assert b"Traceback" not in received
            assert (await face.ask("GET", "/healthz")).status == 200

    async def test_an_offer_of_http_2_is_not_taken_up(self) -> None:
        async with running_http() as face:
            answer = await face.ask("GET", "/healthz", upgrade="h2c", http2_settings="AAMAAABkAAQAAP__")
            assert (answer.status, answer.text) == (200, "ok\n")

    async def test_a_failure_below_http_costs_its_connection_and_is_logged_once(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def fail(*_: object) -> None:
            raise ExceptionGroup("", [RuntimeError("no such thing")])

        async with running_http() as face:
            with monkeypatch.context() as patch, structlog.testing.capture_logs() as logs:
                patch.setattr(connection.HttpConnection, "_read", fail)
                async with await face.connect() as stream:
                    assert await is_dropped(stream)
            (entry,) = logs
            assert isinstance(entry["exc_info"], ExceptionGroup)
            assert (await face.ask("GET", "/healthz")).status == 200

    async def test_the_number_of_connections_is_capped(self) -> None:
        async with running_http(max_connections=2) as face:
            async with await face.connect() as one, await face.connect() as two:
                for stream in (one, two):
                    await stream.send_all(f"GET /healthz HTTP/1.1\r\nhost: {face.authority}\r\n\r\n".encode())
                    assert (await read_answer(stream)).status == 200
                async with await face.connect() as three:
                    assert await is_dropped(three)
            await until_answered(face)


async def until_answered(face: Face) -> None:
    """Ask until there is room again."""
    while True:
        async with await face.connect() as stream:
            await stream.send_all(f"GET /healthz HTTP/1.1\r\nhost: {face.authority}\r\n\r\n".encode())
            with suppress(trio.BrokenResourceError):
                if await stream.receive_some():
                    return


async def until_watched(face: Face, yes: bool) -> None:
    while face.relay.service.events.watched is not yes:
        await trio.lowlevel.checkpoint()


async def fill(face: Face, stream: trio.SocketStream) -> None:
    """Watch without reading, until the relay cannot write any more."""
    await stream.send_all(f"GET /api/v1/watch HTTP/1.1\r\nhost: {face.authority}\r\n\r\n".encode())
    await until_watched(face, True)
    (watcher,) = face.relay.service.events._watchers
    while not watcher._receive.statistics().current_buffer_used:
        for _ in range(50):
            face.relay.service.events.publish("opened", id="t1", name="x" * 10_000)
        await wait_all_tasks_blocked(0.01)


@asynccontextmanager
async def slow_reader(**keys: Any) -> AsyncIterator[tuple[Face, trio.SocketStream]]:
    """A face whose sockets hold little, and a client that will not read."""
    listeners = bind_tcp("127.0.0.1", 0)
    for listener in listeners:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * KIB)
    async with running_http(listeners, **keys) as face, await face.connect() as stream:
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * KIB)
        yield face, stream


class TestTheEnd:
    async def test_nothing_is_left_though_clients_idle_send_and_watch(self) -> None:
        before = open_descriptors()
        async with running_http() as face:
            idle, kept, sending, watching = [await face.connect() for _ in range(4)]
            await kept.send_all(f"GET /healthz HTTP/1.1\r\nhost: {face.authority}\r\n\r\n".encode())
            assert (await read_answer(kept)).status == 200
            await begin(face, sending, "content-length: 5")
            await watching.send_all(f"GET /api/v1/watch HTTP/1.1\r\nhost: {face.authority}\r\n\r\n".encode())
            await until_watched(face, True)
            with trio.fail_after(SOON):
                await face.end()
            await until_watched(face, False)
            for stream in (idle, kept, sending, watching):
                await trio.aclose_forcefully(stream)
        assert open_descriptors() == before

    async def test_a_client_that_reads_nothing_cannot_hold_us(self) -> None:
        async with slow_reader() as (face, stream):
            await fill(face, stream)
            with trio.fail_after(SOON):
                await face.end()

    async def test_an_answer_cut_in_its_head_is_no_failure(self) -> None:
        async with slow_reader() as (face, stream):
            await stream.send_all(f"HEAD / HTTP/1.1\r\nhost: {face.authority}\r\n\r\n".encode() * 5000)
            await wait_all_tasks_blocked(0.01)
            with trio.fail_after(SOON), structlog.testing.capture_logs() as logs:
                await face.end()
            assert logs == []

    async def test_a_client_that_reads_nothing_is_given_up(self) -> None:
        async with slow_reader(write_timeout=0.1) as (face, stream):
            await fill(face, stream)
            await until_watched(face, False)

    async def test_a_last_word_is_short(self) -> None:
        with trio.CancelScope() as scope:
            scope.cancel()
            await trio.lowlevel.cancel_shielded_checkpoint()
            patience = connection._patience_of_a_write(30)
            assert patience.shield
            assert patience.deadline <= trio.current_time() + connection.LAST_WORD

    async def test_a_listener_is_closed_with_it(self) -> None:
        async with running_http() as face:
            await face.end()
            with pytest.raises(OSError, match="failed"):
                await face.connect()

    @pytest.mark.parametrize("words", [{}, {"args": ["drain"]}])
    async def test_who_asks_for_the_end_is_answered(self, words: dict[str, list[str]]) -> None:
        async with running_http() as face:
            face.relay.on_shutdown = face.scope.cancel
            with structlog.testing.capture_logs() as logs:
                answer = await face.post_json("shutdown", words)
                await face.ended.wait()
            assert answer.json["text"] == ("draining, then stopping" if words else "stopping")
            assert logs == []

    @pytest.mark.parametrize("turns", range(12))
    async def test_who_is_being_answered_when_the_end_comes_is_answered(
        self, turns: int, nursery: trio.Nursery
    ) -> None:
        """Whichever step of an answer it meets: of an answer to `restart` every fourth was lost."""

        async def end() -> None:
            for _ in range(turns):
                await trio.lowlevel.checkpoint()
            face.scope.cancel()

        async with running_http() as face:
            face.relay.on_shutdown = lambda: nursery.start_soon(end)
            answer = await face.post_json("shutdown", {})
            await face.ended.wait()
            assert answer.json["text"] == "stopping"

    async def test_a_stream_does_not_hold_up_the_end(self, autojump_clock: MockClock) -> None:
        async with running_http() as face, await face.connect() as stream:
            await stream.send_all(f"GET /api/v1/watch HTTP/1.1\r\nHost: {face.authority}\r\n\r\n".encode())
            assert b"200" in await stream.receive_some()
            await until_watched(face, True)
            before = trio.current_time()
            await face.end()
            assert trio.current_time() == before
