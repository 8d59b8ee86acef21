"""Bodies: large ones, slow ones, and how their senders hear of it."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import trio

from tests.http.support import begin, read_answer, running_http
from tunneld.http import connection

KIB = 1024


async def send_for_ever(stream: trio.SocketStream) -> None:
    while True:
        await stream.send_all(b" " * 64 * KIB)


class TestBodies:
    @pytest.mark.parametrize(("size", "status"), [(KIB, 200), (KIB + 1, 413)])
    async def test_a_body_is_capped_at_the_octet(self, size: int, status: int) -> None:
        async with running_http(max_body=KIB) as face:
            answer = await face.call_xml(b" " * size)
            assert answer.status == status

    @pytest.mark.parametrize(("size", "status"), [(KIB, 200), (KIB + 1, 413)])
    async def test_a_chunked_body_is_capped_at_the_octet(self, size: int, status: int) -> None:
        async with running_http(max_body=KIB) as face, await face.connect() as stream:
            await begin(face, stream, "transfer-encoding: chunked")
            for piece in (b" " * (size - 1), b" "):
                await stream.send_all(b"%x\r\n%s\r\n" % (len(piece), piece))
            if status == 200:
                await stream.send_all(b"0\r\n\r\n")
            assert (await read_answer(stream)).status == status

    async def test_a_body_that_only_announces_to_be_large_is_refused_before_it_comes(self) -> None:
        async with running_http(max_body=KIB) as face, await face.connect() as stream:
            await begin(face, stream, f"content-length: {10**12}")
            answer = await read_answer(stream)
            assert answer.status == 413
            assert answer.text == "413 " + answer.text.splitlines()[0][4:] + "\n" + (
                "the body is larger than 1024 octets (http.max_body)\n"
            )
            assert answer.headers["connection"] == "close"

    @pytest.mark.parametrize("framing", ["content-length: 4000000", "transfer-encoding: chunked"])
    async def test_the_refusal_reaches_a_client_that_sends_all_before_it_reads(self, framing: str) -> None:
        """A reset because of unread octets would overtake it."""
        body = b" " * 4_000_000
        async with running_http(max_body=KIB) as face, await face.connect() as stream:
            await begin(face, stream, framing)
            if "chunked" in framing:
                body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
            await stream.send_all(body)
            await stream.send_eof()
            assert (await read_answer(stream)).status == 413

    async def test_curl_hears_the_refusal_of_a_large_file(self, program_path: Callable[[str], str]) -> None:
        async with running_http(max_body=KIB) as face:
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
            command = [program_path("curl"), *options, f"http://{face.authority}/RPC2"]
            done = await trio.run_process(command, stdin=b" " * 5_000_000, capture_stdout=True, check=False)
            assert done.stdout == b"413"

    async def test_an_endless_body_is_not_read_for_ever(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(connection, "MAX_DISCARD", 64 * KIB)
        monkeypatch.setattr(connection, "LINGER", 1000)
        async with running_http(max_body=KIB) as face, await face.connect() as stream:
            await begin(face, stream, f"content-length: {10**12}")
            with pytest.raises(trio.BrokenResourceError):
                await send_for_ever(stream)

    async def test_a_limit_is_read_anew_after_a_reload(self) -> None:
        async with running_http(max_body=KIB) as face:
            http = face.relay.settings.http.model_copy(update={"max_body": 2 * KIB})
            face.relay.settings = face.relay.settings.model_copy(update={"http": http})
            assert (await face.call_xml(b" " * 2 * KIB)).status == 200

    async def test_a_slow_body_ends_by_read_timeout_however_steadily_it_drips(self) -> None:
        async def drip(stream: trio.SocketStream) -> None:
            while True:
                await stream.send_all(b"1\r\n \r\n")
                await trio.lowlevel.checkpoint()

        async with running_http(read_timeout=0.05, max_body=KIB * KIB) as face, await face.connect() as stream:
            await begin(face, stream, "transfer-encoding: chunked")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(drip, stream)
                answer = await read_answer(stream)
                nursery.cancel_scope.cancel()
            assert answer.status in {408, 413}

    async def test_a_body_that_never_comes_is_a_timeout(self) -> None:
        async with running_http(read_timeout=0.02) as face, await face.connect() as stream:
            await begin(face, stream, "content-length: 5")
            answer = await read_answer(stream)
            assert (answer.status, answer.headers["connection"]) == (408, "close")
            assert "http.read_timeout" in answer.text

    async def test_a_client_that_ends_its_direction_is_answered_all_the_same(self) -> None:
        async with running_http() as face, await face.connect() as stream:
            await stream.send_all(f"GET /healthz HTTP/1.1\r\nhost: {face.authority}\r\n\r\n".encode())
            await stream.send_eof()
            assert (await read_answer(stream)).status == 200
