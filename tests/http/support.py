"""A relay with an HTTP port in the event loop of the test, and an HTTP client."""

from __future__ import annotations

import json
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar
from xmlrpc.client import ServerProxy

import h11
import trio

from tests.support.peers import PATIENCE
from tunneld import http
from tunneld.acme.manager import CertificateManager
from tunneld.auth.authenticator import Authenticator
from tunneld.backends import BACKENDS
from tunneld.config.http import HttpSettings
from tunneld.config.schema import Settings, TunnelSettings
from tunneld.directory.service import TunnelService
from tunneld.egtp.passing import PassingLimits, PassingService
from tunneld.engine import new_engine
from tunneld.net.listeners import ReloadableListener
from tunneld.net.sockets import bind_tcp
from tunneld.tls.store import CertificateStore
from tunneld.wire.lines import Item

T = TypeVar("T")


class FakeDaemon:
    """The daemon as the verbs see it: a real `TunnelService`; calls that concern the process are only recorded."""

    def __init__(self, settings: Settings, service: TunnelService) -> None:
        self.settings = settings
        self.service = service
        self.owners: dict[bytes, str] = {}  # of EGTP nodes
        self.mail = PassingService((), PassingLimits, self.owners.get, lambda _: True, trio.current_time)
        self.certificates = CertificateStore()
        self.certificate_orders = CertificateManager(self.certificates, lambda: settings.acme, None)
        self.shutdowns: list[bool] = []
        self.restarts = 0
        self.on_shutdown: Callable[[], None] = lambda: None
        self.facts: dict[str, Any] = {}  # override the items of `status`

    def status(self) -> Item:
        up, down = self.service.live.octets
        visitors = sum(len(tunnel.visitors) for tunnel in self.service.tunnels())
        facts = {"version": "1.2.3", "uptime": 7, "descriptors": 20, "max_descriptors": 1024, "visitors": visitors}
        counted = {"opened": self.service.live.opened, "served": self.service.live.served, "up": up, "down": down}
        return {**facts, **counted, **self.facts}

    def penalties(self) -> Sequence[Item]:
        return []

    def pardon(self, address: str) -> bool:
        return False

    def reload(self) -> Sequence[Item]:
        return []

    async def restart(self) -> None:
        self.restarts += 1

    def shutdown(self, *, drain: bool) -> None:
        self.shutdowns.append(drain)
        self.on_shutdown()


@dataclass(frozen=True)
class HttpAnswer:
    """A whole response."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class HttpRelay:
    """The address of a running HTTP port, and what is behind it."""

    host: str
    port: int
    daemon: FakeDaemon
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)  # around `http.serve`
    ended: trio.Event = field(default_factory=trio.Event)
    authenticator: Authenticator | None = None
    tls: ssl.SSLContext | None = None

    async def serve(self, listeners: list[socket.socket], *, task_status: trio.TaskStatus[None]) -> None:
        with self.scope:
            await http.serve(
                ReloadableListener("http", listeners),
                self.daemon,
                self.authenticator,
                lambda: self.tls,
                task_status=task_status,
            )
        self.ended.set()

    async def end(self) -> None:
        """Cancel `http.serve`, and wait until it has ended."""
        self.scope.cancel()
        await self.ended.wait()

    @property
    def authority(self) -> str:
        return f"{self.host}:{self.port}"

    async def connect(self) -> trio.SocketStream:
        return await trio.open_tcp_stream(self.host, self.port)

    async def request(self, method: str, path: str, body: bytes = b"", **headers: str) -> HttpAnswer:
        """One request on a connection of its own; an underscore in a header's name stands for a dash."""
        named = {"host": self.authority} | {name.replace("_", "-"): value for name, value in headers.items()}
        lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in named.items())]
        if body:
            lines.append(f"content-length: {len(body)}")
        async with await self.connect() as stream:
            await stream.send_all("\r\n".join([*lines, "connection: close", "", ""]).encode() + body)
            return await read_answer(stream, method)

    async def call_xml(self, body: str | bytes, path: str = "/RPC2") -> HttpAnswer:
        raw = body if isinstance(body, bytes) else body.encode()
        return await self.request("POST", path, raw, content_type="text/xml")

    async def post_json(self, verb: str, content: Any = None) -> HttpAnswer:
        body = b"" if content is None else json.dumps(content).encode()
        return await self.request("POST", f"/api/v1/{verb}", body, content_type="application/json")

    async def with_stock_client(self, talk: Callable[[ServerProxy], T], path: str = "") -> T:
        """Call `talk` with Python's own XML-RPC client, in a thread."""

        def run() -> T:
            with ServerProxy(f"http://{self.authority}{path}") as proxy:
                return talk(proxy)

        return await trio.to_thread.run_sync(run)


HEAD = "POST /RPC2 HTTP/1.1\r\nhost: {}\r\ncontent-type: text/xml\r\n"


async def send_head(relay: HttpRelay, stream: trio.SocketStream, framing: str) -> None:
    """Send the head of an XML-RPC call, without its body."""
    await stream.send_all(f"{HEAD.format(relay.authority)}{framing}\r\n\r\n".encode())


def raising(error: Exception) -> Callable[..., Any]:
    """A function that raises `error`, to put in the place of any other."""

    def bug(*_: object) -> Any:
        raise error

    return bug


async def read_answer(stream: trio.abc.ReceiveStream, method: str = "GET") -> HttpAnswer:
    """Read one response, however it is framed."""
    reader = h11.Connection(h11.CLIENT)
    reader.send(h11.Request(method=method, target="/", headers=[("host", "x")]))
    reader.send(h11.EndOfMessage())
    head: h11.Response | None = None
    body = bytearray()
    while True:
        match reader.next_event():
            case h11.NEED_DATA:
                reader.receive_data(bytes(await stream.receive_some(65536)))
            case h11.Response() as head:
                pass
            case h11.Data(data=data):
                body += data
            case h11.EndOfMessage():
                assert head is not None
                names = {name.decode(): value.decode() for name, value in head.headers}
                return HttpAnswer(head.status_code, names, bytes(body))


@asynccontextmanager
async def running_http(
    listeners: list[socket.socket] | None = None,
    authenticator: Authenticator | None = None,
    tls: ssl.SSLContext | None = None,
    **keys: Any,
) -> AsyncIterator[HttpRelay]:
    """A running relay; `keys` are keys of `[http]`. The block fails after `PATIENCE` seconds."""
    settings = Settings(http=HttpSettings(**keys), tunnels=TunnelSettings(ports="0"))
    listeners = listeners or bind_tcp("127.0.0.1", 0)
    host, port = listeners[0].getsockname()[:2]
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            engine = new_engine()
            await nursery.start(engine.run)
            service = TunnelService(lambda: settings, engine, BACKENDS)
            await nursery.start(service.run)
            relay = HttpRelay(host, port, FakeDaemon(settings, service), authenticator=authenticator, tls=tls)
            await nursery.start(relay.serve, listeners)
            yield relay
            nursery.cancel_scope.cancel()
