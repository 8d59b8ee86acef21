"""The relay and real servers read the same number of requests from the same bytes, and answers go where they belong."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
import trio

from tests.support.counting import SCRIPT
from tests.support.named import Named, ResponseReader, named
from tests.support.programs import free_port, listening
from tests.support.smuggling import NAME, Case, cases
from tests.support.system import lacking

MARKER = b"GET /marker HTTP/1.1\r\nHost: %b\r\nConnection: close\r\n\r\n" % NAME

NGINX = """
daemon off; master_process off; pid {folder}/pid; error_log {folder}/error.log;
events {{ worker_connections 1024; }}
http {{
    log_format targets '$request_method $request_uri';
    access_log {folder}/access.log targets;
    client_body_temp_path {folder}; proxy_temp_path {folder}; fastcgi_temp_path {folder}; uwsgi_temp_path {folder};
    scgi_temp_path {folder};
    large_client_header_buffers 4 16k;
    server {{
        listen 127.0.0.1:{port};
        location / {{ return 200 $request_uri; }}
    }}
}}
"""


HAPROXY = """
global
    log stdout format raw local0
defaults
    mode http
    timeout client 20s
frontend count
    bind 127.0.0.1:{port}
    log global
    log-format "%HM %HU"
    http-request return status 200 content-type text/plain lf-string "%[path]"
"""


class RecordingServer:
    """Records every byte of its connections. It answers each empty line that ends a head or a chunked body, as the most
    lenient reader would: whatever looks like a request line is counted.
    """

    def __init__(self) -> None:
        self.connections: list[bytearray] = []

    async def serve(self, stream: trio.SocketStream) -> None:
        """Answer each request with its target."""
        received = bytearray()
        answered = 0
        try:
            async for chunk in stream:
                if not received and b"X-Request-Id" in chunk:  # what did not come through the relay is no case
                    self.connections.append(received)
                received += chunk
                while (request := _first_request(bytes(received[answered:]))) is not None:
                    size, method, target = request
                    answered += size
                    body = b"" if method == b"HEAD" else target
                    await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(target) + body)
        except trio.BrokenResourceError:
            return

    def targets(self) -> list[bytes]:
        """The targets of all requests."""
        found = []
        for received in self.connections:
            at = 0
            while (request := _first_request(bytes(received[at:]))) is not None:
                at += request[0]
                found.append(request[2])
        return found

    def forget(self) -> None:
        """Forget the connections so far."""
        self.connections.clear()


def _first_request(data: bytes) -> tuple[int, bytes, bytes] | None:
    """The length, method and target of the request at the start of `data`; None: it is not complete."""
    head, separator, rest = data.partition(b"\r\n\r\n")
    if not separator:
        return None
    method, target, _version = head.split(b"\r\n")[0].split(b" ")
    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
    size = len(head) + 4
    if fields.get(b"transfer-encoding") == b"chunked":
        while True:
            line, separator, rest = rest.partition(b"\r\n")
            if not separator:
                return None
            size += len(line) + 2
            count = int(line, 16)
            if not count:
                break
            if len(rest) < count + 2:
                return None
            size, rest = size + count + 2, rest[count + 2 :]
        while True:
            line, separator, rest = rest.partition(b"\r\n")
            if not separator:
                return None
            size += len(line) + 2
            if not line:
                return size, method, target
    length = int(fields.get(b"content-length", b"0"))
    return (size + length, method, target) if len(rest) >= length else None


@asynccontextmanager
async def recording() -> AsyncIterator[tuple[RecordingServer, str]]:
    server = RecordingServer()
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, server.serve, [listener])
        yield server, str(listener.socket.getsockname()[1])
        nursery.cancel_scope.cancel()


async def answers(site: Named, case: Case, number: int = 0) -> list[tuple[int, bytes]]:
    """Send a case and the marker; return the statuses and the beginnings of the bodies. `number` is added to the
    targets.
    """
    async with await site.connect() as stream:
        reader, found = ResponseReader(stream), []
        await stream.send_all((case.data + MARKER).replace(b"/case", b"/case%d" % number))
        for method in (case.method, "GET", "GET"):
            response = await reader.response(method)
            if response is None:
                break
            found.append((response.status, response.body.partition(b"\n")[0].partition(b"?")[0]))
        assert await reader.ended()
        return found


def expected(case: Case, number: int = 0) -> list[tuple[int, bytes]]:
    """The answers to a case that passes."""
    return [(200, b"" if case.method == "HEAD" else b"/case%d" % number), (200, b"/marker")]


async def test_each_case_is_refused_or_one_request_at_both_sides(tmp_path: Path) -> None:
    async with recording() as (server, port), named(tmp_path, {"blog": port}) as site:
        wrong = {}
        for name, case in cases().items():
            server.forget()
            found = await answers(site, case)
            seen = [target.partition(b"?")[0] for target in server.targets()]
            bytes_seen = b"".join(map(bytes, server.connections))
            if case.status is None:
                good = found == expected(case) and seen == [b"/case0", b"/marker"]
            else:
                good = [status for status, _ in found] == [case.status] and not seen and b"/marker" not in bytes_seen
                good &= name.startswith("body:") or not bytes_seen
            if not good:
                wrong[name] = (found, seen)
        assert wrong == {}


async def test_nginx_counts_the_same_requests(tmp_path: Path, program_path: Callable[[str], str]) -> None:
    """Its log tells what it has read: of one that is refused in its body at most the head, and never what is behind."""
    port, configuration = await free_port(), tmp_path / "nginx.conf"
    configuration.write_text(NGINX.format(folder=tmp_path, port=port))
    numbered = dict(enumerate(cases().values()))
    async with (
        listening([program_path("nginx"), "-c", str(configuration)], port),
        named(tmp_path, {"blog": str(port)}) as site,
    ):
        found = {number: await answers(site, case, number) for number, case in numbered.items()}
        await answers(site, cases()["GET"])  # nginx writes a line before it reads the next request
    for number, case in numbered.items():
        if case.status is None:
            assert found[number] == expected(case, number)
        else:
            assert [status for status, _ in found[number]] == [case.status]
    seen = [line.split()[1].partition("?")[0] for line in (tmp_path / "access.log").read_text().splitlines()]
    passed = [number for number, case in numbered.items() if case.status is None]
    counts = {number: seen.count(f"/case{number}") for number in passed}
    assert counts == dict.fromkeys(passed, 1)
    assert "/smuggled" not in seen
    assert seen.count("/marker") in (len(passed), len(passed) + 1)


@asynccontextmanager
async def counting(kind: str, folder: Path, find: Callable[[str], str]) -> AsyncIterator[tuple[str, Path]]:
    """Run a server that notes the requests that it has read; yields its port and the file."""
    port, file = await free_port(), folder / "counted"
    file.touch()
    python = [sys.executable, "-m"]
    if kind == "node":
        (folder / "server.js").write_text(SCRIPT)
        command = [find("node"), str(folder / "server.js"), str(port)]
    elif kind == "haproxy":
        (folder / "haproxy.cfg").write_text(HAPROXY.format(port=port))
        command = [find("haproxy"), "-db", "-f", str(folder / "haproxy.cfg")]
    elif kind == "gunicorn":
        application = ["--worker-class", "gthread", "--threads", "4", "tests.support.counting:wsgi"]
        command = [*python, "gunicorn", "--bind", f"127.0.0.1:{port}", *application]
    else:
        application = ["--http", kind.rpartition(" ")[2], "tests.support.counting:asgi"]
        command = [*python, "uvicorn", "--port", str(port), "--log-level", "critical", *application]
    if command[:2] == python and find_spec(command[2]) is None:
        lacking(f"the Python package {command[2]} is not installed")
    with file.open("a") as output:
        environment = os.environ | {"COUNTED": str(file)}
        async with listening(command, port, env=environment, stdout=output):
            yield str(port), file


@pytest.mark.parametrize("kind", ["haproxy", "uvicorn with httptools", "uvicorn with h11", "gunicorn", "node"])
async def test_servers_count_the_same_requests(tmp_path: Path, program_path: Callable[[str], str], kind: str) -> None:
    """A server may refuse what the relay lets pass. But it reads each request once, and the marker behind it."""
    numbered, wrong = dict(enumerate(cases().values())), {}
    async with counting(kind, tmp_path, program_path) as (port, file), named(tmp_path, {"blog": port}) as site:
        for number, case in numbered.items():
            found = await answers(site, case, number)
            if case.status is not None:
                good = [status for status, _ in found] == [case.status]
            else:
                refused = len(found) == 2 and found[0][0] in {400, 501} and found[1] == (200, b"/marker")
                good = refused or found == expected(case, number)
            if not good:
                wrong[number] = (case, found)
    assert wrong == {}
    seen = [line.split()[1].partition("?")[0] for line in file.read_text().splitlines()]
    assert "/smuggled" not in seen
    assert all(seen.count(f"/case{number}") <= 1 for number in numbered)
    passed = sum(case.status is None for case in numbered.values())
    assert seen.count("/marker") == passed


@pytest.mark.parametrize("name", ["trailer of the relay", "trailers about the framing"])
async def test_trailers_that_a_server_could_take_for_fields_stay_behind(tmp_path: Path, name: str) -> None:
    async with recording() as (server, port), named(tmp_path, {"blog": port}) as site:
        await answers(site, cases()[name])
        (received,) = server.connections
        assert b"hello\r\n0\r\n\r\nGET /marker " in bytes(received)
