"""A running pump, a shared port's connections, and hidden servers that the test writes by hand."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
import trio

from tests.engine.bench import Ends, open_descriptors, stream, tcp_pair
from tunneld.engine.engine import Limiter
from tunneld.engine.limits import EngineLimits
from tunneld.engine.plain_transport import PlainTransport
from tunneld.engine.pump import Pump
from tunneld.engine.tls_end import TlsEnd
from tunneld.net.endpoint import Peer
from tunneld.policy.admission import AdmissionRefusal
from tunneld.policy.limits import HttpLimits
from tunneld.sites.access_log import AccessLog
from tunneld.sites.connection import HttpConnection
from tunneld.sites.fields import HostRewrite, Origin
from tunneld.sites.guard import SiteGuard
from tunneld.sites.pages import error_page
from tunneld.sites.site import OnVerdict, Request
from tunneld.sites.stream import RequestStream

TEST_TIMEOUT = 120
"""Seconds after which a test fails; virtual seconds count, too."""

ORIGIN = Origin(("192.0.2.7", 50000), b"http", ("127.0.0.1", 80))


class Received:
    """Reads a stream by delimiters."""

    def __init__(self, far: Any) -> None:
        self.far = far
        self.data = b""

    async def until(self, delimiter: bytes) -> bytes:
        """Everything up to and with `delimiter`."""
        while delimiter not in self.data:
            chunk = await self.far.receive_some()
            assert chunk, f"the stream ended after {self.data!r}"
            self.data += chunk
        found, self.data = (
            self.data[: self.data.index(delimiter) + len(delimiter)],
            self.data[self.data.index(delimiter) + len(delimiter) :],
        )
        return found

    async def head(self) -> list[bytes]:
        """The lines of the next head."""
        return (await self.until(b"\r\n\r\n")).split(b"\r\n")[:-2]

    async def exactly(self, count: int) -> bytes:
        """The next `count` bytes."""
        while len(self.data) < count:
            chunk = await self.far.receive_some()
            assert chunk, f"the stream ended after {self.data!r}"
            self.data += chunk
        found, self.data = self.data[:count], self.data[count:]
        return found

    async def response(self) -> tuple[bytes, bytes]:
        """The status line and the body of a response with a Content-Length."""
        head = await self.head()
        (length,) = (int(line[16:]) for line in head if line.lower().startswith(b"content-length: "))
        return head[0], await self.exactly(length)

    async def rest(self) -> bytes:
        """Everything up to the end of file."""
        async for chunk in self.far:
            self.data += chunk
        found, self.data = self.data, b""
        return found


@dataclass
class FakeSite:
    """A site whose hidden servers are the far sockets of the test, one for each stream."""

    pump: Pump
    tunnel: str = "t1"
    rewrite: HostRewrite | None = None
    guard: SiteGuard | None = None
    response: bytes | None = None
    verdicts: list[OnVerdict] | None = None  # of requests that are examined
    is_open: bool = True
    refusal: AdmissionRefusal | None = None
    is_waiting: bool = False  # for a connection to the hidden server: the test connects it
    keeps_tls: bool = False
    throttle: Limiter | None = None
    clients: list[str] = field(default_factory=list)
    reached: list[Peer | None] = field(default_factory=list)  # by connections that are passed on
    servers: list[trio.SocketStream] = field(default_factory=list)
    ends: list[Ends] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    connected: trio.Event = field(default_factory=trio.Event)
    streams: list[RequestStream] = field(default_factory=list)

    def examine(self, request: Request, on_verdict: OnVerdict) -> None:
        if self.guard is not None:
            self.guard.examine(request, on_verdict)
        elif self.verdicts is None:
            on_verdict(self.response)
        else:
            self.verdicts.append(on_verdict)

    def open(self, stream: RequestStream, client: Peer, origin: Origin) -> None:
        self.streams.append(stream)
        self.clients.append(client[0])
        if self.refusal is not None:
            stream.refuse(self.refusal)
            return
        if not self.is_open:
            stream.reset("nobody is connected")
            return
        if not self.is_waiting:
            self.connect(stream)

    def open_connection(self, connection: socket.socket, peer: Peer, reached: Peer | None, server_name: str) -> None:
        self.clients.append(peer[0])
        self.reached.append(reached)
        self.connect(connection)

    def connect(self, requests: RequestStream | socket.socket) -> None:
        far, near = tcp_pair(SO_RCVBUF=65_536, SO_SNDBUF=65_536)
        ends = Ends()
        self.servers.append(stream(far))
        self.ends.append(ends)
        self.connected.set()
        self.connected = trio.Event()
        self.pump.join(requests, near, linger=30.0, on_end=ends.note, throttle=self.throttle)

    async def server(self, number: int = 0) -> Received:
        """The hidden server's connection with this number, once there is one."""
        while len(self.servers) <= number:
            await self.connected.wait()
        return Received(self.servers[number])

    def on_failed(self, reason: str) -> None:
        self.failures.append(reason)


@dataclass
class SitesBench:
    """The sites by host name, and the connections of visitors."""

    pump: Pump
    sites: dict[str, FakeSite] = field(default_factory=dict)
    connections: list[HttpConnection] = field(default_factory=list)
    over: list[HttpConnection] = field(default_factory=list)
    limits: HttpLimits = field(default_factory=HttpLimits)
    access_log: AccessLog | None = None
    far: list[trio.SocketStream] = field(default_factory=list)

    def site(self, host: str, **options: object) -> FakeSite:
        self.sites[host] = FakeSite(self.pump, **options)  # type: ignore[arg-type]
        return self.sites[host]

    def visit(self, *, secure: bool = False, **options: int) -> Received:
        """A visitor's connection; a `secure` one counts as TLS."""
        far, near = tcp_pair(**options)
        end = TlsEnd(self.pump, PlainTransport(near))
        origin = replace(ORIGIN, scheme=b"https") if secure else ORIGIN
        self.connections.append(HttpConnection(end, origin, self.find, self.limits, self.over.append, self.access_log))
        self.connections[-1].start()
        self.far.append(stream(far))
        return Received(self.far[-1])

    def find(self, request: Request) -> FakeSite | bytes:
        site = self.sites.get(request.head.host)
        return site or error_page(404, request.head, request.identity, keep_alive=request.keep_alive)


@pytest.fixture
async def bench(nursery: trio.Nursery) -> AsyncIterator[SitesBench]:
    """A running pump; every descriptor is closed at the end."""
    before = open_descriptors()
    pump = Pump(EngineLimits())

    async def guard() -> None:
        with trio.fail_after(TEST_TIMEOUT):
            await trio.sleep_forever()

    async with trio.open_nursery() as inner:
        inner.start_soon(guard)
        await inner.start(partial(pump.run))
        bench = SitesBench(pump)
        yield bench
        inner.cancel_scope.cancel()
    for far in [*bench.far, *(server for site in bench.sites.values() for server in site.servers)]:
        far.socket.close()
    assert open_descriptors() == before
