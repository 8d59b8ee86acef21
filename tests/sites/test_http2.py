"""HTTP/2 of visitors: streams become requests of HTTP/1.1, and nothing gets past the checks of these."""

from __future__ import annotations

import select
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h2.settings
import pytest
import trio
from trio.testing import MockClock

from tests.sites.conftest import Received
from tests.sites.test_ports import GET, OK, PortsBench, ports
from tunneld.sites.http2 import MAX_CANCELLED, MAX_IDLE_FRAMES, MAX_STREAMS, STREAM_WINDOW

__all__ = ["ports"]

NAME = "a.example"
HEADERS = [(":method", "GET"), (":scheme", "https"), (":authority", NAME), (":path", "/page?x=1")]
NO_CHECKS = {"validate_outbound_headers": False, "normalize_outbound_headers": False}


class Visitor:
    """A client that collects the events of its streams."""

    def __init__(self, tls: trio.SSLStream[trio.SocketStream], **config: Any) -> None:
        self.tls = tls
        self.frames = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8", **config))
        self.headers: dict[int, list[list[tuple[str, str]]]] = {}  # by stream: of each head, and the trailers
        self.body: dict[int, bytes] = {}
        self.ended: dict[int, int] = {}  # 0, or the code of the reset
        self.gone: int | None = None  # the code of GOAWAY
        self.acknowledges = True  # gives the windows back
        self.frames.initiate_connection()
        self._sending = trio.Lock()

    async def flush(self) -> None:
        async with self._sending:
            await self.tls.send_all(self.frames.data_to_send())

    async def ask(self, *headers: tuple[str, str], body: bytes | None = b"") -> int:
        """Send a request; `body` None: DATA follows."""
        number: int = self.frames.get_next_available_stream_id()
        self.frames.send_headers(number, headers or HEADERS, end_stream=body == b"")
        if body:
            self.frames.send_data(number, body, end_stream=True)
        await self.flush()
        return number

    async def receive(self) -> bool:
        """Handle what comes next. False: the connection has ended."""
        try:
            data = await self.tls.receive_some()
        except trio.BrokenResourceError:
            return False
        for event in self.frames.receive_data(data) if data else ():
            self.on_event(event)
        if data:
            with suppress(trio.BrokenResourceError):
                await self.flush()
        return bool(data)

    def on_event(self, event: h2.events.Event) -> None:
        number: Any = getattr(event, "stream_id", None)
        match event:
            case (
                h2.events.ResponseReceived() | h2.events.InformationalResponseReceived() | h2.events.TrailersReceived()
            ):
                self.headers.setdefault(number, []).append([(str(a), str(b)) for a, b in event.headers or ()])
            case h2.events.DataReceived():
                self.body[number] = self.body.get(number, b"") + (event.data or b"")
                if self.acknowledges:
                    self.frames.acknowledge_received_data(event.flow_controlled_length or 0, number)
            case h2.events.StreamEnded():
                self.ended[number] = 0
            case h2.events.StreamReset():
                self.ended[number] = int(event.error_code or 0)
            case h2.events.ConnectionTerminated():
                self.gone = int(event.error_code or 0)

    async def response(self, number: int) -> tuple[str, bytes]:
        """The status and the body of a complete response."""
        while number not in self.ended:
            assert await self.receive(), "the connection ended"
        assert self.ended[number] == 0
        return dict(self.headers[number][-1])[":status"], self.body.get(number, b"")

    async def reset(self, number: int) -> int:
        """Wait until the relay has reset a stream; returns the code."""
        while number not in self.ended:
            assert await self.receive(), "the connection ended"
        return self.ended[number]

    async def until_gone(self) -> int | None:
        """Wait until the connection has ended; returns the code of GOAWAY."""
        while await self.receive():
            pass
        return self.gone


Connect = Callable[..., Any]
RESET = (socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@pytest.fixture
def connect(ports: PortsBench) -> Connect:
    store: Any = ports.ports.handshakes._certificates
    store.offer(("h2", "http/1.1"))

    async def connect(name: str = NAME, **config: Any) -> Visitor:
        tls = await ports.handshake(name, "h2", "http/1.1")
        assert tls.selected_alpn_protocol() == "h2"
        visitor = Visitor(tls, **config)
        await visitor.flush()
        return visitor

    return connect


async def test_a_request_and_its_response(ports: PortsBench, connect: Connect) -> None:
    site = ports.site(NAME)
    visitor = await connect()
    number = await visitor.ask(*HEADERS, ("cookie", "a=1"), ("cookie", "b=2"), ("te", "trailers"))
    server = await site.server()
    head = await server.head()
    assert head[0] == b"GET /page?x=1 HTTP/1.1"
    assert {b"host: a.example", b"cookie: a=1; b=2", b"X-Forwarded-Proto: https"} <= set(head)
    assert not any(line.lower().startswith((b"te:", b"transfer-encoding:", b"content-length:")) for line in head)
    assert [line for line in head if line.startswith(b"X-Forwarded-For")] == [b"X-Forwarded-For: 192.0.2.7"]
    await server.far.send_all(
        b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"
        b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nConnection: x-own\r\nX-Own: 1\r\nContent-Length: 2\r\n\r\nok"
    )
    assert await visitor.response(number) == ("200", b"ok")
    early, final = map(dict, visitor.headers[number])
    assert (early[":status"], early["link"]) == ("103", "</x>")
    assert (final["content-type"], final["content-length"]) == ("text/plain", "2")
    assert not {"connection", "x-own"} & final.keys()


def frames_in(data: bytes) -> list[tuple[int, int, bytes]]:
    """Type, stream and payload of each frame. The client's `h2` reads nothing behind a GOAWAY."""
    found = []
    while data:
        size = int.from_bytes(data[:3])
        found.append((data[3], int.from_bytes(data[5:9]), data[9 : 9 + size]))
        data = data[9 + size :]
    return found


GOAWAY, RST_STREAM, DATA = 7, 3, 0


async def test_a_relay_that_drains_completes_streams_and_takes_no_more(ports: PortsBench, connect: Connect) -> None:
    site = ports.site(NAME)
    visitor = await connect()
    first = await visitor.ask()
    server = await site.server()
    await server.head()
    ports.names.on_draining()
    ports.names.on_draining()
    second = await visitor.ask()
    await server.far.send_all(OK)
    found = frames_in(b"".join([bytes(chunk) async for chunk in visitor.tls]))
    told = [(kind, stream, payload) for kind, stream, payload in found if kind in (GOAWAY, RST_STREAM, DATA)]
    assert told[0] == (GOAWAY, 0, first.to_bytes(4) + bytes(4))
    assert (RST_STREAM, second, h2.errors.ErrorCodes.REFUSED_STREAM.to_bytes(4)) in told
    assert (DATA, first, b"ok") in told
    assert len(site.servers) == 1


async def test_a_connection_without_streams_is_closed_when_the_relay_drains(
    ports: PortsBench, connect: Connect
) -> None:
    site = ports.site(NAME)
    visitor = await connect()
    number = await visitor.ask()
    await (await site.server()).far.send_all(OK)
    assert await visitor.response(number) == ("200", b"ok")
    ports.names.on_draining()
    assert await visitor.until_gone() == h2.errors.ErrorCodes.NO_ERROR


async def test_without_the_setting_there_is_no_http2(ports: PortsBench) -> None:
    tls = await ports.handshake(NAME, "h2", "http/1.1")
    assert tls.selected_alpn_protocol() == "http/1.1"


async def test_http1_goes_on_beside_it(ports: PortsBench, connect: Connect) -> None:
    site = ports.site(NAME)
    tls = await ports.handshake(NAME, "http/1.1")
    await tls.send_all(GET % (b"/", NAME.encode()))
    server = await site.server()
    await server.head()
    await server.far.send_all(OK)
    assert await Received(tls).response() == (b"HTTP/1.1 200 OK", b"ok")


async def test_streams_are_independent(ports: PortsBench, connect: Connect) -> None:
    site = ports.site(NAME)
    visitor = await connect()
    numbers = [await visitor.ask() for _ in range(3)]
    servers = [await site.server(number) for number in range(3)]
    for server in servers:
        await server.head()
    await servers[2].far.send_all(OK.replace(b"ok", b"3!"))
    assert await visitor.response(numbers[2]) == ("200", b"3!")
    await servers[0].far.send_all(OK.replace(b"ok", b"1!"))
    assert await visitor.response(numbers[0]) == ("200", b"1!")
    assert numbers[1] not in visitor.headers


async def test_a_request_for_another_name_is_a_421(ports: PortsBench, connect: Connect) -> None:
    ports.site("blog.t.example")
    other = ports.site("shop.t.example")
    visitor = await connect("blog.t.example")
    number = await visitor.ask(*HEADERS[:2], (":authority", "shop.t.example"), (":path", "/"))
    assert (await visitor.response(number))[0] == "421"
    assert not other.clients


# Bodies


@pytest.mark.parametrize("length", [True, False])
async def test_a_large_upload_arrives_within_its_window(ports: PortsBench, connect: Connect, *, length: bool) -> None:
    site = ports.site(NAME)
    visitor = await connect()
    content = bytes(range(256)) * 2048
    headers = [(":method", "POST"), *HEADERS[1:], *([("content-length", str(len(content)))] if length else [])]
    number = await visitor.ask(*headers, body=None)
    server = await site.server()
    head = await server.head()
    assert (b"content-length: %d" % len(content) in head) is length
    assert (b"Transfer-Encoding: chunked" in head) is not length
    received = bytearray()

    async def read() -> None:
        if length:
            received.extend(await server.exactly(len(content)))
        else:
            while size := int((await server.until(b"\r\n"))[:-2], 16):
                received.extend(await server.exactly(size))
                await server.exactly(2)
            assert await server.until(b"\r\n\r\n") == b"x-sum: 1\r\n\r\n"
        await server.far.send_all(OK)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        at = 0
        while at < len(content):
            size = min(visitor.frames.local_flow_control_window(number), 16384, len(content) - at)
            if size:
                visitor.frames.send_data(
                    number, content[at : at + size], end_stream=length and at + size == len(content)
                )
                at += size
                await visitor.flush()
            else:
                await visitor.receive()
        if not length:
            visitor.frames.send_headers(number, [("x-sum", "1")], end_stream=True)
            await visitor.flush()
        assert await visitor.response(number) == ("200", b"ok")
    assert received == content


async def receive_all(visitor: Visitor) -> None:
    while await visitor.receive():
        pass


async def test_a_server_that_does_not_read_stops_the_upload(ports: PortsBench, connect: Connect) -> None:
    site = ports.site(NAME)
    visitor = await connect()
    number = await visitor.ask((":method", "POST"), *HEADERS[1:], body=None)
    await (await site.server()).head()
    sent, stalls = 0, 0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive_all, visitor)
        while stalls < 2:
            if size := min(visitor.frames.local_flow_control_window(number), 16384):
                visitor.frames.send_data(number, bytes(size))
                sent, stalls = sent + size, 0
                await visitor.flush()
            else:
                await trio.testing.wait_all_tasks_blocked(0.02)
                stalls += 1
        nursery.cancel_scope.cancel()
    assert STREAM_WINDOW < sent < 16 * 1024 * 1024


@pytest.mark.parametrize("framing", ["length", "chunks", "end"])
async def test_a_large_download_arrives_within_the_windows(ports: PortsBench, connect: Connect, framing: str) -> None:
    site = ports.site(NAME)
    visitor = await connect()
    number = await visitor.ask()
    server = await site.server()
    await server.head()
    content = bytes(range(256)) * 2048

    async def write() -> None:
        if framing == "length":
            await server.far.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(content), content))
        elif framing == "chunks":
            await server.far.send_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            for at in range(0, len(content), 10_000):
                chunk = content[at : at + 10_000]
                await server.far.send_all(b"%x\r\n%b\r\n" % (len(chunk), chunk))
            await server.far.send_all(b"0\r\nX-Sum: 1\r\n\r\n")
        else:
            await server.far.send_all(b"HTTP/1.1 200 OK\r\n\r\n" + content)
            await server.far.send_eof()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write)
        if framing == "chunks":
            while number not in visitor.ended:
                await visitor.receive()
            assert visitor.headers[number][-1] == [("x-sum", "1")]
        else:
            assert (await visitor.response(number))[0] == "200"
    assert visitor.body[number] == content


async def test_a_visitor_that_does_not_read_stops_the_server(ports: PortsBench, connect: Connect) -> None:
    site = ports.site(NAME)
    visitor = await connect()
    visitor.acknowledges = False
    number, other = await visitor.ask(), await visitor.ask()
    servers = [await site.server(0), await site.server(1)]
    for server in servers:
        await server.head()
    await servers[0].far.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n")
    sent, far = 0, servers[0].far.socket
    while select.select([], [far], [], 0)[1]:
        sent += await far.send(bytes(65536))
        await trio.testing.wait_all_tasks_blocked(0.02)
    assert sent < 16 * 1024 * 1024
    visitor.frames.increment_flow_control_window(1000)  # of the connection: its other streams go on
    await visitor.flush()
    await servers[1].far.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    assert await visitor.response(other) == ("200", b"")
    assert len(visitor.body.get(number, b"")) <= 65535 + 1000


@pytest.mark.parametrize(
    "sent", [b"Content-Length: 9\r\n\r\nhalf", b"Transfer-Encoding: chunked\r\n\r\n9\r\nhalf", b"\r\nhalf"]
)
async def test_half_a_response_never_ends_cleanly(ports: PortsBench, connect: Connect, sent: bytes) -> None:
    site = ports.site(NAME)
    visitor = await connect()
    number = await visitor.ask()
    server = await site.server()
    await server.head()
    await server.far.send_all(b"HTTP/1.1 200 OK\r\n" + sent)
    while visitor.body.get(number) != b"half":
        await visitor.receive()
    if sent.startswith(b"\r"):  # only a reset tells that it is not complete
        server.far.setsockopt(*RESET)
        server.far.socket.close()
    else:
        await server.far.send_eof()
    assert await visitor.reset(number) == h2.errors.ErrorCodes.INTERNAL_ERROR
    assert await visitor.ask()  # the connection goes on


async def test_a_response_in_front_of_the_whole_request_ends_the_upload(ports: PortsBench, connect: Connect) -> None:
    site = ports.site(NAME)
    visitor = await connect()
    number = await visitor.ask((":method", "POST"), *HEADERS[1:], body=None)
    server = await site.server()
    await server.head()
    await server.far.send_all(b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
    while number not in visitor.ended:
        await visitor.receive()
    assert dict(visitor.headers[number][0])[":status"] == "413"
    assert visitor.ended[number] == 0


@pytest.mark.parametrize(("method", "status"), [("HEAD", "200"), ("GET", "204"), ("GET", "304")])
async def test_responses_without_a_body(ports: PortsBench, connect: Connect, method: str, status: str) -> None:
    site = ports.site(NAME)
    visitor = await connect()
    number = await visitor.ask((":method", method), *HEADERS[1:])
    server = await site.server()
    await server.head()
    await server.far.send_all(
        b"HTTP/1.1 %b X\r\n%b\r\n" % (status.encode(), b"Content-Length: 5\r\n" * (method == "HEAD"))
    )
    assert await visitor.response(number) == (status, b"")


# What a visitor must not be able to do

ABSENT = "absent"
BAD_HEADERS = {
    "request in the path": [(":path", "/ HTTP/1.1\r\nhost: b.example\r\n\r\nGET /")],
    "space in the path": [(":path", "/a b")],
    "no slash": [(":path", "a")],
    "absolute": [(":path", "http://b.example/")],
    "line in the method": [(":method", "GET / HTTP/1.1\r\nx:")],
    "line in the host": [(":authority", "a.example\r\nx: y")],
    "other host": [("host", "b.example")],
    "no host": [(":authority", ABSENT)],
    "line in a value": [("x", "a\r\ny: b")],
    "newline in a value": [("x", "a\ny: b")],
    "null in a value": [("x", "a\0b")],
    "control character in a value": [("x", "a\x01b")],
    "colon in a name": [("x: y\r\nz", "a")],
    "capitals in a name": [("X", "a")],
    "two lengths": [("content-length", "1"), ("content-length", "2")],
    "length in words": [("content-length", "+1")],
    "length without a body": [("content-length", "5")],
    "chunked": [("transfer-encoding", "chunked")],
    "connection": [("connection", "x-forwarded-for")],
    "upgrade": [("upgrade", "websocket")],
    "another te": [("te", "gzip")],
    "unknown pseudo field": [(":protocol", "websocket")],
}


@pytest.mark.parametrize("name", BAD_HEADERS)
async def test_what_is_no_request_reaches_no_server(ports: PortsBench, connect: Connect, name: str) -> None:
    site = ports.site(NAME)
    visitor = await connect(**NO_CHECKS)
    wrong = BAD_HEADERS[name]
    request = [(key, dict(wrong).get(key, value)) for key, value in HEADERS]
    request += [field for field in wrong if field[0] not in dict(HEADERS) and field[0].startswith(":")]
    request += [field for field in wrong if not field[0].startswith(":")]
    number = await visitor.ask(*((key, value) for key, value in request if value != ABSENT))
    while number not in visitor.ended and visitor.gone is None and await visitor.receive():
        pass
    code = visitor.ended[number] if visitor.gone is None else visitor.gone
    assert code == h2.errors.ErrorCodes.PROTOCOL_ERROR
    assert not site.clients


async def test_a_body_that_is_not_as_long_as_announced(ports: PortsBench, connect: Connect) -> None:
    site = ports.site(NAME)
    visitor = await connect()
    await visitor.ask((":method", "POST"), *HEADERS[1:], ("content-length", "5"), body=b"1234567")
    assert await visitor.until_gone() == h2.errors.ErrorCodes.PROTOCOL_ERROR
    for number in range(len(site.clients)):
        server = await site.server(number)
        with suppress(trio.BrokenResourceError):
            assert b"1234567" not in await server.rest()


CALM = {h2.errors.ErrorCodes.ENHANCE_YOUR_CALM, None}
"""A reset may overtake GOAWAY."""


async def test_cancelled_streams_are_bounded(ports: PortsBench, connect: Connect) -> None:
    ports.settings.max_connections = 1000
    ports.settings.max_connections_per_source = 1000
    ports.site(NAME)
    visitor = await connect()
    try:
        for _ in range(4 * MAX_CANCELLED):
            number = await visitor.ask()
            visitor.frames.reset_stream(number, h2.errors.ErrorCodes.CANCEL)
            await visitor.flush()
            await trio.testing.wait_all_tasks_blocked()
    except (trio.BrokenResourceError, h2.exceptions.ProtocolError):
        pass
    assert await visitor.until_gone() in CALM


@pytest.mark.parametrize("kind", ["ping", "settings", "empty data"])
async def test_frames_that_carry_nothing_are_bounded(ports: PortsBench, connect: Connect, kind: str) -> None:
    ports.site(NAME)
    visitor = await connect()
    number = await visitor.ask((":method", "POST"), *HEADERS[1:], body=None)
    with suppress(trio.BrokenResourceError, h2.exceptions.ProtocolError):
        for count in range(4 * MAX_IDLE_FRAMES):
            if kind == "ping":
                visitor.frames.ping(b"12345678")
            elif kind == "settings":
                visitor.frames.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 65535 + count % 2})
            else:
                visitor.frames.send_data(number, b"")
            if count % 100 == 0:
                await visitor.flush()
    assert await visitor.until_gone() in CALM
    while len(ports.ports):
        await trio.lowlevel.checkpoint()


async def test_streams_at_a_time_are_bounded(ports: PortsBench, connect: Connect) -> None:
    ports.settings.max_connections = ports.settings.max_connections_per_source = 1000
    visitor = await connect()
    await visitor.receive()
    assert visitor.frames.remote_settings.max_concurrent_streams == MAX_STREAMS


async def test_each_stream_takes_a_place(ports: PortsBench, connect: Connect) -> None:
    site = ports.site(NAME)
    ports.settings.max_connections = 3
    visitor = await connect()
    numbers = [await visitor.ask() for _ in range(2)]
    for number in range(2):
        await (await site.server(number)).head()
    assert len(ports.ports) == 3
    refused = await visitor.ask()
    assert await visitor.reset(refused) == h2.errors.ErrorCodes.REFUSED_STREAM
    server = await site.server(0)
    await server.far.send_all(OK)
    assert await visitor.response(numbers[0]) == ("200", b"ok")
    await trio.testing.wait_all_tasks_blocked()
    assert len(ports.ports) == 2
    await visitor.tls.aclose()
    while len(ports.ports):
        await trio.lowlevel.checkpoint()


async def test_an_idle_connection_makes_room(ports: PortsBench, connect: Connect) -> None:
    ports.site(NAME)
    ports.settings.max_connections = 1
    visitor = await connect()
    await trio.testing.wait_all_tasks_blocked()
    other = ports.connect(tls=False)
    assert await visitor.until_gone() == h2.errors.ErrorCodes.NO_ERROR
    await other.send_all(GET % (b"/", b"b.example"))
    assert (await Received(other).response())[0] == b"HTTP/1.1 404 Not Found"


async def test_connections_without_requests_time_out(
    ports: PortsBench, connect: Connect, autojump_clock: MockClock
) -> None:
    began = trio.current_time()
    visitor = await connect()
    assert await visitor.until_gone() == h2.errors.ErrorCodes.NO_ERROR
    assert trio.current_time() - began == pytest.approx(10, abs=0.5)
    visitor = await connect()
    began = trio.current_time()
    number = await visitor.ask()
    assert (await visitor.response(number))[0] == "404"
    assert await visitor.until_gone() == h2.errors.ErrorCodes.NO_ERROR
    assert trio.current_time() - began == pytest.approx(75, abs=0.5)


async def test_garbage_in_place_of_frames(ports: PortsBench, connect: Connect) -> None:
    tls = await ports.handshake(NAME, "h2")
    await tls.send_all(b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n")
    visitor = Visitor(tls)
    assert await visitor.until_gone() == h2.errors.ErrorCodes.PROTOCOL_ERROR
    while len(ports.ports):
        await trio.lowlevel.checkpoint()
