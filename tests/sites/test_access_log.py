"""The access log: lines, the file and its rotation, and what happens when it cannot be written."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import trio

from tests.sites.conftest import ORIGIN, SitesBench
from tunneld import line_log
from tunneld.sites.access_log import AccessLog, AccessRecord, Format, format_line
from tunneld.sites.site import Request
from tunneld.wire.http1 import parse_request

GET = b"GET /a%b HTTP/1.1\r\nHost: a.example\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@dataclass
class LogSettings:
    access_log_file: Path | None
    access_log: Format = "json"
    access_log_query: bool = False


@dataclass
class LogBench:
    settings: LogSettings
    log: AccessLog

    async def lines(self, count: int) -> list[dict[str, object]]:
        """The lines of the file, once there are so many."""
        path = self.settings.access_log_file
        assert path is not None
        while not path.exists() or len(path.read_text().splitlines()) < count:
            await trio.lowlevel.checkpoint()
        return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
async def logged(tmp_path: Path, bench: SitesBench) -> AsyncIterator[LogBench]:
    settings = LogSettings(tmp_path / "access.log")
    log = AccessLog(lambda: settings)
    async with trio.open_nursery() as nursery:
        await nursery.start(log.run)
        bench.access_log = log
        yield LogBench(settings, log)
        nursery.cancel_scope.cancel()


async def test_each_request_of_a_connection_has_a_line(bench: SitesBench, logged: LogBench) -> None:
    site = bench.site("a.example", tunnel="t7")
    visitor = bench.visit()
    await visitor.far.send_all(
        b"POST /a?secret=1 HTTP/1.1\r\nHost: a.example\r\nX-Request-Id: r1\r\nContent-Length: 5\r\n\r\nhello"
        + GET % b""
    )
    server = await site.server()
    await server.head()
    await server.exactly(5)
    await server.far.send_all(OK)
    await server.head()
    await server.far.send_all(b"HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n")
    first, second = await logged.lines(2)
    expected = {"method": "POST", "path": "/a", "status": 200, "up": 5, "down": 2, "tunnel": "t7", "id": "r1"}
    assert expected.items() <= first.items()
    assert (first["host"], first["client"]) == ("a.example", "192.0.2.7")
    assert (second["method"], second["status"], second["up"], second["down"]) == ("GET", 404, 0, 0)


async def test_the_answers_of_the_relay_have_lines_too(bench: SitesBench, logged: LogBench) -> None:
    await bench.visit().far.send_all(GET % b"")
    assert (await logged.lines(1))[0]["status"] == 404
    await bench.visit().far.send_all(b"GET / HTTP/1.1\r\n\r\n")
    broken = (await logged.lines(2))[1]
    assert (broken["status"], broken["method"], broken["client"]) == (400, "", "192.0.2.7")


async def test_a_connection_that_is_cut_has_a_line(bench: SitesBench, logged: LogBench) -> None:
    site = bench.site("a.example")
    visitor = bench.visit()
    await visitor.far.send_all(GET % b"")
    await (await site.server()).head()
    bench.connections[0].drop("the relay stopped")
    assert (await logged.lines(1))[0]["status"] == 0


async def test_an_upgraded_connection_has_one_line_with_its_bytes(bench: SitesBench, logged: LogBench) -> None:
    site = bench.site("a.example")
    visitor = bench.visit()
    upgrade = b"Connection: Upgrade\r\nUpgrade: echo\r\n\r\n"
    await visitor.far.send_all((GET % b"")[:-2] + upgrade + b"abc")
    server = await site.server()
    await server.head()
    await server.far.send_all(b"HTTP/1.1 101 Switching Protocols\r\n" + upgrade + b"hello")
    await visitor.head()
    assert await visitor.exactly(5) == b"hello"
    assert await server.exactly(3) == b"abc"
    await visitor.far.send_eof()
    await server.far.send_eof()
    (line,) = await logged.lines(1)
    assert (line["status"], line["up"], line["down"]) == (101, 3, 5)


@pytest.mark.parametrize("reloads", [True, False])
async def test_a_file_that_was_renamed_is_opened_again(
    bench: SitesBench, logged: LogBench, tmp_path: Path, reloads: bool
) -> None:
    visitor = bench.visit()
    for number in range(2):
        await visitor.far.send_all(GET % b"")
        assert len(await logged.lines(1)) == 1
        await visitor.response()
        (tmp_path / "access.log").rename(tmp_path / f"access.log.{number}")
        if reloads:
            logged.log.reopen()


async def test_a_file_that_cannot_be_opened_is_reported_and_tried_again(
    bench: SitesBench, logged: LogBench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    visitor = bench.visit()
    logged.settings.access_log_file = tmp_path / "missing" / "access.log"
    await visitor.far.send_all(GET % b"")
    await visitor.response()
    while not logged.log.lost:
        await trio.lowlevel.checkpoint()
    await trio.testing.wait_all_tasks_blocked()
    assert "access log lost lines" in capsys.readouterr().out
    (tmp_path / "missing").mkdir()
    await visitor.far.send_all(GET % b"")
    assert len(await logged.lines(1)) == 1


async def test_a_reader_that_does_not_read_costs_lines_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], autojump_clock: object
) -> None:
    monkeypatch.setattr(line_log, "MAX_ENTRIES", 10)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    settings = LogSettings(pipe)
    log = AccessLog(lambda: settings)
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(log.run)
            log.end(replace(record(), tunnel="t" * 200_000))  # more than a pipe holds
            while log.waiting:
                await trio.lowlevel.checkpoint()
            for _ in range(15):
                log.end(record())
            assert log.lost == 5
            nursery.cancel_scope.cancel()
    finally:
        while True:  # let the threads end
            try:
                if not os.read(reader, 1 << 20):
                    break
            except BlockingIOError:
                await trio.lowlevel.checkpoint()
        os.close(reader)
    assert "lines=5" in capsys.readouterr().out


def record(query: bytes = b"?x=1") -> AccessRecord:
    head = parse_request(GET % query)
    request = Request(head, False, ("192.0.2.7", 1), b"r1", True)
    return AccessRecord("192.0.2.7", request, 0.0, "t7", 200, 1, 2, ended_at=1e9, seconds=0.01234)


def test_a_line_of_text() -> None:
    line = format_line(record(b'"?x=1'), "text", with_query=True)
    assert line == (
        '2001-09-09T01:46:40.000Z 192.0.2.7 a.example "GET /a%22?x=1" 200 up=1 down=2 ms=12.3 tunnel=t7 id=r1\n'
    )
    unread = AccessRecord("192.0.2.7", None, 0.0, status=400)
    assert format_line(unread, "text", with_query=False).endswith('" 400 up=0 down=0 ms=0.0 tunnel=- id=-\n')


@pytest.mark.parametrize(("with_query", "path"), [(False, "/a"), (True, "/a?x=1")])
def test_the_query_is_left_out_by_default(with_query: bool, path: str) -> None:
    assert json.loads(format_line(record(), "json", with_query=with_query))["path"] == path


async def test_nothing_is_logged_while_it_is_off() -> None:
    settings = LogSettings(None, "off")
    assert not AccessLog(lambda: settings).is_on
    assert ORIGIN.address == "192.0.2.7"
