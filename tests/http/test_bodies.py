"""Large and slow bodies, and whether their senders receive the error."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import trio

from tests.http.support import read_answer, running_http, send_head
from tunneld.http import connection

KIB = 1024


async def send_for_ever(stream: trio.SocketStream) -> None:
    while True:
        await stream.send_all(b" " * 64 * KIB)


class TestBodies:
    @pytest.mark.parametrize(("size", "status"), [(KIB, 200), (KIB + 1, 413)])
    async def test_max_body_is_exact(self, size: int, status: int) -> None:
        async with running_http(max_body=KIB) as relay:
            answer = await relay.call_xml(b" " * size)
            assert answer.status == status

    @pytest.mark.parametrize(("size", "status"), [(KIB, 200), (KIB + 1, 413)])
    async def test_max_body_is_exact_for_a_chunked_body(self, size: int, status: int) -> None:
        async with running_http(max_body=KIB) as relay, await relay.connect() as stream:
            await send_head(relay, stream, "transfer-encoding: chunked")
            for piece in (b" " * (size - 1), b" "):
                await stream.send_all(b"%x\r\n%s\r\n" % (len(piece), piece))
            if status == 200:
                await stream.send_all(b"0\r\n\r\n")
            assert (await read_answer(stream)).status == status

    async def test_a_large_content_length_is_refused_before_the_body_arrives(self) -> None:
        async with running_http(max_body=KIB) as relay, await relay.connect() as stream:
            await send_head(relay, stream, f"content-length: {10**12}")
            answer = await read_answer(stream)
            assert answer.status == 413
            assert answer.text == "413 " + answer.text.splitlines()[0][4:] + "\n" + (
                "the body is larger than 1024 bytes (http.max_body)\n"
            )
            assert answer.headers["connection"] == "close"

    @pytest.mark.parametrize("framing", ["content-length: 4000000", "transfer-encoding: chunked"])
    async def test_the_error_reaches_a_client_that_sends_everything_before_it_reads(self, framing: str) -> None:
        """A reset because of unread bytes would overtake it."""
        body = b" " * 4_000_000
        async with running_http(max_body=KIB) as relay, await relay.connect() as stream:
            await send_head(relay, stream, framing)
            if "chunked" in framing:
                body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
            await stream.send_all(body)
            await stream.send_eof()
            assert (await read_answer(stream)).status == 413

    async def test_curl_receives_the_error_for_a_large_file(self, program_path: Callable[[str], str]) -> None:
        async with running_http(max_body=KIB) as relay:
            options = [
                "-s",
                "-o",
                os.devnull,
                "-w",
                "%{http_code}",
                "-H",
                "content-type: text/xml",
                "--data-binary",
                "@-",
            ]
            command = [program_path("curl"), *options, f"http://{relay.authority}/RPC2"]
            done = await trio.run_process(command, stdin=b" " * 5_000_000, capture_stdout=True, check=False)
            assert done.stdout == b"413"

    async def test_reading_of_an_endless_body_is_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(connection, "MAX_DISCARDED_BYTES", 64 * KIB)
        monkeypatch.setattr(connection, "CLOSE_TIMEOUT", 1000)
        async with running_http(max_body=KIB) as relay, await relay.connect() as stream:
            await send_head(relay, stream, f"content-length: {10**12}")
            with pytest.raises(trio.BrokenResourceError):
                await send_for_ever(stream)

    async def test_max_body_applies_after_a_reload(self) -> None:
        async with running_http(max_body=KIB) as relay:
            http = relay.daemon.settings.http.model_copy(update={"max_body": 2 * KIB})
            relay.daemon.settings = relay.daemon.settings.model_copy(update={"http": http})
            assert (await relay.call_xml(b" " * 2 * KIB)).status == 200

    async def test_a_steadily_dripping_body_times_out(self) -> None:
        async def drip(stream: trio.SocketStream) -> None:
            while True:
                await stream.send_all(b"1\r\n \r\n")
                await trio.lowlevel.checkpoint()

        async with running_http(read_timeout=0.05, max_body=KIB * KIB) as relay, await relay.connect() as stream:
            await send_head(relay, stream, "transfer-encoding: chunked")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(drip, stream)
                answer = await read_answer(stream)
                nursery.cancel_scope.cancel()
            assert answer.status in {408, 413}

    async def test_a_missing_body_times_out(self) -> None:
        async with running_http(read_timeout=0.02) as relay, await relay.connect() as stream:
            await send_head(relay, stream, "content-length: 5")
            answer = await read_answer(stream)
            assert (answer.status, answer.headers["connection"]) == (408, "close")
            assert "http.read_timeout" in answer.text

    async def test_a_half_closed_client_is_answered(self) -> None:
        async with running_http() as relay, await relay.connect() as stream:
            await stream.send_all(f"GET /healthz HTTP/1.1\r\nhost: {relay.authority}\r\n\r\n".encode())
            await stream.send_eof()
            assert (await read_answer(stream)).status == 200
