"""The agent tells the user if the local server refuses requests for its public name."""

from __future__ import annotations

import pytest
import trio

from tests.agent.support import Handler, RecordingReporter, local_server, unused_port
from tunneld.agent.host_check import report_plain_http, report_refused_host
from tunneld.agent.local import LocalServer
from tunneld.net.endpoint import Target

PUBLIC, LOCAL = "blog.t.example.org", "localhost:8000"


def answering(**statuses: int) -> Handler:
    """A server that answers with one status for the public name and another for the local one."""

    async def handler(stream: trio.SocketStream) -> None:
        request = b""
        while b"\r\n\r\n" not in request:
            request += await stream.receive_some()
        status = statuses["public"] if f"Host: {PUBLIC}\r\n".encode() in request else statuses["local"]
        await stream.send_all(b"HTTP/1.1 %d Status\r\nContent-Length: 0\r\n\r\n" % status)

    return handler


@pytest.mark.parametrize(
    ("public", "local", "reported"),
    [
        (403, 200, True), (400, 302, True), (404, 200, True), (421, 500, True),
        (200, 200, False), (500, 200, False), (403, 403, False), (404, 400, False), (302, 200, False),
    ],
)  # fmt: skip
async def test_only_a_server_that_knows_its_local_name_alone_is_reported(
    public: int, local: int, reported: bool
) -> None:
    reporter = RecordingReporter()
    async with local_server(answering(public=public, local=local)) as target:
        await report_refused_host(LocalServer(target), PUBLIC, LOCAL, reporter)
    assert [event for event, _ in reporter.events] == ["trouble"] * reported
    if reported:
        assert reporter.events[0][1]["reason"] == (
            f"the local server refuses requests for {PUBLIC} (status {public}) but not for {LOCAL}; "
            "use --host-header local"
        )


async def test_a_server_that_does_not_answer_or_speaks_no_http_is_not_reported() -> None:
    async def other(stream: trio.SocketStream) -> None:
        await stream.send_all(b"SSH-2.0-x\r\n")

    async def gone(stream: trio.SocketStream) -> None:
        await stream.aclose()

    reporter = RecordingReporter()
    await report_refused_host(LocalServer(Target("127.0.0.1", unused_port())), PUBLIC, LOCAL, reporter)
    for handler in (other, gone):
        async with local_server(handler) as target:
            await report_refused_host(LocalServer(target), PUBLIC, LOCAL, reporter)
    assert reporter.events == []


@pytest.mark.parametrize("answers_hello", [True, False])
async def test_a_server_that_answers_plain_http_only_is_reported_where_https_is_promised(
    answers_hello: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunneld.agent.host_check.CHECK_TIMEOUT", 0.5)

    async def handler(stream: trio.SocketStream) -> None:
        if not (first := await stream.receive_some()).startswith(b"GET ") and not answers_hello:
            await trio.sleep_forever()
        assert first
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    reporter = RecordingReporter()
    async with local_server(handler) as target:
        await report_plain_http(LocalServer(target), reporter)
    ((event, fields),) = reporter.events
    assert event == "trouble"
    assert "speaks plain HTTP" in str(fields["reason"])


@pytest.mark.parametrize("answer", [b"\x15\x03\x03\x00\x02\x02\x28", b"SSH-2.0-x\r\n"])
async def test_a_server_with_tls_or_without_http_is_not_reported(answer: bytes) -> None:
    async def handler(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        await stream.send_all(answer)

    reporter = RecordingReporter()
    async with local_server(handler) as target:
        await report_plain_http(LocalServer(target), reporter)
    await report_plain_http(LocalServer(Target("127.0.0.1", unused_port())), reporter)
    assert reporter.events == []
