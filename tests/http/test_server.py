"""Connections: keep-alive, clients that do not read or do not speak HTTP, and shutdown."""

from __future__ import annotations

import re
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from types import SimpleNamespace
from typing import Any

import pytest
import structlog
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.http.support import HttpRelay, read_answer, running_http, send_head
from tests.support.peers import is_dropped
from tunneld.http import connection
from tunneld.http.auth import ConnectionInfo
from tunneld.net.sockets import bind_tcp, open_descriptors

KIB = 1024
SHUTDOWN_TIMEOUT = 5.0
"""Seconds of real time for a shutdown that should take none, also on a busy machine."""

H2_HELLO = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x01\x01\x05\x00\x00\x00\x01\x00"


class TestConnections:
    async def test_a_connection_is_kept_alive_and_closed_when_idle(self) -> None:
        async with running_http(keep_alive_timeout=0.2) as relay, await relay.connect() as stream:
            for _ in range(3):
                await stream.send_all(f"GET /healthz HTTP/1.1\r\nhost: {relay.authority}\r\n\r\n".encode())
                assert (await read_answer(stream)).status == 200
            assert await is_dropped(stream)

    async def test_pipelined_requests_are_answered_in_order(self) -> None:
        async with running_http() as relay, await relay.connect() as stream:
            ends = f" HTTP/1.1\r\nhost: {relay.authority}\r\n"
            requests = f"GET /nothing{ends}\r\nGET /healthz{ends}\r\nGET /api/v1/list{ends}connection: close\r\n\r\n"
            await stream.send_all(requests.encode())
            received = b"".join([chunk async for chunk in stream])
            assert re.findall(rb"HTTP/1.1 (\d+)", received) == [b"404", b"200", b"200"]

    @pytest.mark.parametrize("start", [b"", b"GET /healthz HTTP/1.1\r\nhost: x"])
    async def test_an_unfinished_head_times_out(self, start: bytes) -> None:
        async with running_http(keep_alive_timeout=0.05) as relay, await relay.connect() as stream:
            await stream.send_all(start)
            assert await is_dropped(stream)

    @pytest.mark.parametrize(
        "sent",
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
    async def test_other_protocols_end_their_own_connection_only(self, sent: bytes) -> None:
        async with running_http(keep_alive_timeout=0.05) as relay:
            async with await relay.connect() as stream:
                await stream.send_all(sent)
                await stream.send_eof()
                received = b"".join([chunk async for chunk in stream])
                assert b"200" not in received
                assert b"Traceback" not in received
            assert (await relay.request("GET", "/healthz")).status == 200

    async def test_an_upgrade_to_http_2_is_declined(self) -> None:
        async with running_http() as relay:
            answer = await relay.request("GET", "/healthz", upgrade="h2c", http2_settings="AAMAAABkAAQAAP__")
            assert (answer.status, answer.text) == (200, "ok\n")

    async def test_an_exception_below_http_ends_its_connection_and_is_logged_once(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def fail(*_: object) -> None:
            raise ExceptionGroup("", [RuntimeError("no such thing")])

        async with running_http() as relay:
            with monkeypatch.context() as patch, structlog.testing.capture_logs() as logs:
                patch.setattr(connection.ApiConnection, "_read", fail)
                async with await relay.connect() as stream:
                    assert await is_dropped(stream)
            (entry,) = logs
            assert isinstance(entry["exc_info"], ExceptionGroup)
            assert (await relay.request("GET", "/healthz")).status == 200

    async def test_the_number_of_connections_is_limited(self) -> None:
        async with running_http(max_connections=2) as relay:
            async with await relay.connect() as one, await relay.connect() as two:
                for stream in (one, two):
                    await stream.send_all(f"GET /healthz HTTP/1.1\r\nhost: {relay.authority}\r\n\r\n".encode())
                    assert (await read_answer(stream)).status == 200
                async with await relay.connect() as three:
                    assert await is_dropped(three)
            await until_answered(relay)


async def until_answered(relay: HttpRelay) -> None:
    """Connect until a connection is accepted again."""
    while True:
        async with await relay.connect() as stream:
            await stream.send_all(f"GET /healthz HTTP/1.1\r\nhost: {relay.authority}\r\n\r\n".encode())
            with suppress(trio.BrokenResourceError):
                if await stream.receive_some():
                    return


async def until_watched(relay: HttpRelay, yes: bool) -> None:
    while relay.daemon.service.events.watched is not yes:
        await trio.lowlevel.checkpoint()


async def fill(relay: HttpRelay, stream: trio.SocketStream) -> None:
    """Watch without reading, until the relay cannot write any more."""
    await stream.send_all(f"GET /api/v1/watch HTTP/1.1\r\nhost: {relay.authority}\r\n\r\n".encode())
    await until_watched(relay, True)
    ((watcher,),) = relay.daemon.service.events._watchers.values()
    while not watcher._receive.statistics().current_buffer_used:
        for _ in range(50):
            relay.daemon.service.events.publish("opened", id="t1", name="x" * 10_000)
        await wait_all_tasks_blocked(0.01)


@asynccontextmanager
async def slow_reader(**keys: Any) -> AsyncIterator[tuple[HttpRelay, trio.SocketStream]]:
    """A relay with small socket buffers, and a client that does not read."""
    listeners = bind_tcp("127.0.0.1", 0)
    for listener in listeners:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * KIB)
    async with running_http(listeners, **keys) as relay, await relay.connect() as stream:
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * KIB)
        yield relay, stream


class TestShutdown:
    async def test_shutdown_closes_idle_sending_and_watching_connections(self) -> None:
        before = open_descriptors()
        async with running_http() as relay:
            idle, kept, sending, watching = [await relay.connect() for _ in range(4)]
            await kept.send_all(f"GET /healthz HTTP/1.1\r\nhost: {relay.authority}\r\n\r\n".encode())
            assert (await read_answer(kept)).status == 200
            await send_head(relay, sending, "content-length: 5")
            await watching.send_all(f"GET /api/v1/watch HTTP/1.1\r\nhost: {relay.authority}\r\n\r\n".encode())
            await until_watched(relay, True)
            with trio.fail_after(SHUTDOWN_TIMEOUT):
                await relay.end()
            await until_watched(relay, False)
            for stream in (idle, kept, sending, watching):
                await trio.aclose_forcefully(stream)
        assert open_descriptors() == before

    async def test_a_client_that_does_not_read_does_not_delay_shutdown(self) -> None:
        async with slow_reader() as (relay, stream):
            await fill(relay, stream)
            with trio.fail_after(SHUTDOWN_TIMEOUT):
                await relay.end()

    async def test_an_answer_cut_in_its_head_logs_nothing(self) -> None:
        async with slow_reader() as (relay, stream):
            await stream.send_all(f"HEAD / HTTP/1.1\r\nhost: {relay.authority}\r\n\r\n".encode() * 5000)
            await wait_all_tasks_blocked(0.01)
            with trio.fail_after(SHUTDOWN_TIMEOUT), structlog.testing.capture_logs() as logs:
                await relay.end()
            assert logs == []

    async def test_a_client_that_does_not_read_times_out(self) -> None:
        async with slow_reader(write_timeout=0.1) as (relay, stream):
            await fill(relay, stream)
            await until_watched(relay, False)

    async def test_a_write_after_cancellation_has_a_short_timeout(self) -> None:
        with trio.CancelScope() as cancelled:
            cancelled.cancel()
            await trio.lowlevel.cancel_shielded_checkpoint()
            served: Any = SimpleNamespace(_write_timeout=30.0, _info=ConnectionInfo())
            scope = connection.ApiConnection._write_scope(served)
            assert scope.shield
            assert scope.deadline <= trio.current_time() + connection.FINAL_WRITE_TIMEOUT

    async def test_shutdown_closes_the_listener(self) -> None:
        async with running_http() as relay:
            await relay.end()
            with pytest.raises(OSError, match="failed"):
                await relay.connect()

    @pytest.mark.parametrize("content", [{}, {"args": ["drain"]}])
    async def test_the_request_that_stops_the_daemon_is_answered(self, content: dict[str, list[str]]) -> None:
        async with running_http() as relay:
            relay.daemon.on_shutdown = relay.scope.cancel
            with structlog.testing.capture_logs() as logs:
                answer = await relay.post_json("shutdown", content)
                await relay.ended.wait()
            assert answer.json["text"] == ("draining, then stopping" if content else "stopping")
            assert [log["event"] for log in logs] == ["request"]

    @pytest.mark.parametrize("turns", range(12))
    async def test_an_answer_in_progress_is_finished_on_shutdown(self, turns: int, nursery: trio.Nursery) -> None:
        """At whichever step of the answer the cancellation comes; once, every fourth answer to `restart` was lost."""

        async def cancel_later() -> None:
            for _ in range(turns):
                await trio.lowlevel.checkpoint()
            relay.scope.cancel()

        async with running_http() as relay:
            relay.daemon.on_shutdown = lambda: nursery.start_soon(cancel_later)
            answer = await relay.post_json("shutdown", {})
            await relay.ended.wait()
            assert answer.json["text"] == "stopping"

    async def test_a_stream_does_not_delay_shutdown(self, autojump_clock: MockClock) -> None:
        async with running_http() as relay, await relay.connect() as stream:
            await stream.send_all(f"GET /api/v1/watch HTTP/1.1\r\nHost: {relay.authority}\r\n\r\n".encode())
            answer = b""
            while b"watching" not in answer:
                answer += await stream.receive_some()
            assert b"200" in answer
            before = trio.current_time()
            await relay.end()
            assert trio.current_time() == before
