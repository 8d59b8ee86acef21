"""A relay, an agent with an inspector, a local server, and the page over real sockets."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import pytest
import trio

from tests.agent.support import PATIENCE, RecordingReporter, local_server, relay_here
from tests.support.peers import connect, read_all, read_exactly
from tunneld.agent.config import ExposureConfig
from tunneld.agent.expose import open_exposure
from tunneld.agent.inspection import Inspectors, tapped_end
from tunneld.agent.network import NetworkMonitor
from tunneld.agent.relay_connection import RelayConnection
from tunneld.agent.request import TunnelRequest
from tunneld.engine import new_engine
from tunneld.engine.end_stream import EndStream
from tunneld.engine.engine import Engine
from tunneld.engine.limits import EngineLimits
from tunneld.engine.portable import PortableEngine
from tunneld.errors import ListenError
from tunneld.inspector import web
from tunneld.inspector.settings import InspectSettings
from tunneld.net.endpoint import Endpoint, Target

pytestmark = pytest.mark.usefixtures("each_backend")

ANY_PORT = InspectSettings(port=0)
GET = b"GET /hello?key=k HTTP/1.1\r\nHost: blog\r\nConnection: close\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"


async def answer(stream: trio.SocketStream) -> None:
    """A local server: each chunk is a request."""
    with suppress(trio.BrokenResourceError):
        async for chunk in stream:
            if chunk.startswith(b"\r\n\r\n\0") and len(chunk) < 50:
                continue  # a PROXY header by itself
            await stream.send_all(OK)
            if b"Connection: close" in chunk:
                break
        await stream.send_eof()


@dataclass
class Inspected:
    """A running agent, and its page."""

    reporter: RecordingReporter
    cookie: str = ""

    @property
    def public(self) -> Endpoint:
        return Endpoint.parse(str(self.reporter.all("opened")[0]["address"]))

    @property
    def link(self) -> str:
        return str(self.reporter.all("inspecting")[0]["url"])

    @property
    def port(self) -> int:
        return int(self.link.split(":")[2].split("/")[0])

    async def visit(self, data: bytes = GET) -> bytes:
        """What the local server answers a visitor."""
        async with await connect(self.public) as stream:
            await stream.send_all(data)
            await stream.send_eof()
            return await read_all(stream)

    async def ask(self, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        """Status and body of a page."""
        async with await trio.open_tcp_stream("127.0.0.1", self.port) as stream:
            head = f"{'GET' if body is None else 'POST'} {path} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\n"
            head += f"Cookie: {self.cookie}\r\nConnection: close\r\n"
            if body is not None:
                head += f"Origin: http://127.0.0.1:{self.port}\r\nContent-Type: application/json\r\n"
                head += f"Content-Length: {len(body)}\r\n"
            await stream.send_all(head.encode() + b"\r\n" + (body or b""))
            raw = await read_all(stream)
        start, _, content = raw.partition(b"\r\n\r\n")
        if found := re.search(rb"\r\nset-cookie: ([^;]+)", start, re.IGNORECASE):
            self.cookie = found[1].decode()
        return int(start.split()[1]), content

    async def exchange(self, number: int) -> dict[str, Any]:
        """The exchange with this id, once it has ended."""
        while True:
            status, body = await self.ask(f"/inspect/api/exchanges/{number}")
            if status == 200 and json.loads(body)["duration"] is not None:
                found: dict[str, Any] = json.loads(body)
                return found
            await trio.sleep(0.01)


@asynccontextmanager
async def inspected(settings: InspectSettings = ANY_PORT, *, keep_header: bool = False) -> AsyncIterator[Inspected]:
    reporter = RecordingReporter()
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay, local_server(answer) as target, trio.open_nursery() as nursery:
            engine, monitor = new_engine(), NetworkMonitor()
            await nursery.start(engine.run)
            connection = RelayConnection(relay.access, monitor)
            nursery.start_soon(connection.run)
            request = TunnelRequest({"name": "blog"}, keep_header=keep_header)
            config = ExposureConfig(target, request, scheme="http", linger=PATIENCE, inspect=settings)
            async with open_exposure(config, connection, reporter, engine, monitor) as exposure:
                nursery.start_soon(exposure.run)
                await reporter.wait_for("opened")
                here = Inspected(reporter)
                assert (await here.ask(here.link[here.link.index("/?") :]))[0] == 200
                yield here
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("keep_header", [False, True])
async def test_a_request_is_shown_and_sent_again(keep_header: bool) -> None:
    async with inspected(keep_header=keep_header) as here:
        assert await here.visit() == OK
        shown = await here.exchange(1)
        assert (shown["method"], shown["target"], shown["status"]) == ("GET", "/hello?key=[redacted]", 200)
        assert (shown["exposure"], shown["response"]["text"], shown["note"]) == ("blog", "hello", "")
        assert shown["visitor"].startswith("127.0.0.1:")
        edits = {"id": 1, "method": "POST", "target": "/again", "text": "body"}
        assert await here.ask("/inspect/api/replay", json.dumps(edits).encode()) == (200, b'{"replayed": 1}')
        again = await here.exchange(2)
        assert (again["method"], again["target"], again["status"], again["replay_of"]) == ("POST", "/again", 200, 1)
        assert again["request"]["text"] == "body"


async def test_the_relay_goes_on_where_the_inspector_cannot() -> None:
    async with inspected() as here:
        assert await here.visit(b"\x00\xffgarbage") == OK
        shown = await here.exchange(1)
        assert shown["note"] == "not HTTP: it does not begin with a request"
        async with await connect(here.public) as stream:
            for _ in range(3):
                await stream.send_all(GET.replace(b"Connection: close\r\n", b""))
                assert await read_exactly(stream, len(OK)) == OK
        assert [(await here.exchange(number))["status"] for number in (2, 3, 4)] == [200] * 3


async def test_the_page_closes_with_the_exposure() -> None:
    async with inspected() as here:
        assert (await here.ask("/inspect/"))[0] == 200
        assert (await here.ask("/inspect/inspector.css"))[0] == 200
    with pytest.raises(OSError, match="connect"):
        await trio.open_tcp_stream("127.0.0.1", here.port)


async def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = InspectSettings(port=taken.getsockname()[1])
        async with inspected(settings) as here:
            assert here.port != settings.port
        with pytest.RaisesGroup(ListenError, allow_unwrapped=True, flatten_subgroups=True):
            async with inspected(replace(settings, is_default=False)):
                pass


async def test_another_address_comes_with_a_warning() -> None:
    async with inspected(InspectSettings("0.0.0.0", 0, is_default=False)) as here:
        (warning,) = here.reporter.all("trouble")
        assert "other machines" in str(warning["reason"])
        assert here.link.startswith("http://127.0.0.1:")


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"nonsense\r\n\r\n", b"400"),
        (b"GET /%s HTTP/1.1\r\n\r\n" % (b"a" * 200_000), b"431"),
        (
            b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % (web.MAX_BODY + 1) + bytes(web.MAX_BODY + 1),
            b"413",
        ),
    ],
)
async def test_nonsense_at_the_page(data: bytes, status: bytes) -> None:
    async with inspected() as here:
        stream = await trio.open_tcp_stream("127.0.0.1", here.port)
        async with trio.open_nursery() as nursery:

            async def send() -> None:
                with suppress(trio.BrokenResourceError):
                    await stream.send_all(data)

            nursery.start_soon(send)
            assert (await stream.receive_some()).startswith(b"HTTP/1.1 " + status)
        await stream.aclose()
        assert (await here.ask("/inspect/"))[0] == 200


async def test_a_limited_number_of_connections_to_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "MAX_CONNECTIONS", 2)
    async with inspected() as here:
        first = await trio.open_tcp_stream("127.0.0.1", here.port)
        second = await trio.open_tcp_stream("127.0.0.1", here.port)
        async with await trio.open_tcp_stream("127.0.0.1", here.port) as third:
            assert await read_all_or_reset(third) == b""
        await first.aclose()
        await second.aclose()


async def read_all_or_reset(stream: trio.SocketStream) -> bytes:
    try:
        return await read_all(stream)
    except trio.BrokenResourceError:
        return b""


async def test_exposures_with_the_same_settings_share_an_inspector() -> None:
    async with trio.open_nursery() as nursery:
        inspectors = Inspectors(nursery)
        with inspectors.shared(ANY_PORT) as (first, first_is_new):
            assert first_is_new
            with inspectors.shared(ANY_PORT) as (second, second_is_new):
                assert (second, second_is_new) == (first, False)
            with inspectors.shared(replace(ANY_PORT, host="localhost")) as (third, third_is_new):
                assert third_is_new
                assert third is not first
            async with await trio.open_tcp_stream("127.0.0.1", first.inspected.port):
                pass
    with pytest.raises(OSError, match="connect"):  # the nursery has ended: nothing runs any more
        await trio.open_tcp_stream("127.0.0.1", first.inspected.port)


class Notes:
    """A tap that notes what it gets."""

    def __init__(self) -> None:
        self.written = self.read = b""

    def on_written(self, data: bytes | bytearray | memoryview) -> None:
        self.written += data

    def on_read(self, data: bytes | bytearray | memoryview) -> None:
        self.read += data


@pytest.mark.parametrize("make", [new_engine, lambda: PortableEngine(EngineLimits())], ids=["native", "portable"])
async def test_a_tap_gets_what_passes_with_every_engine(make: Any) -> None:
    engine: Engine = make()
    notes = Notes()
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery, local_server(answer) as target:
            await nursery.start(engine.run)
            async with EndStream(tapped_end(engine, await dialled(target), notes)) as stream:
                await stream.send_all(GET)
                await stream.send_eof()
                assert await read_all(stream) == OK
            nursery.cancel_scope.cancel()
    assert (notes.written, notes.read) == (GET, OK)


async def dialled(target: Target) -> socket.socket:
    made = socket.create_connection((target.host, target.port))
    made.setblocking(False)
    return made
