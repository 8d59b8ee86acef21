"""A control server with a scripted daemon behind it, and a client for it."""

from __future__ import annotations

import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

from tests.support.peers import PATIENCE, connect
from tunneld.auth.authenticator import Authenticator
from tunneld.config.schema import ControlSettings
from tunneld.control.server import serve_lines
from tunneld.directory.reply import Reply
from tunneld.directory.requester import Requester
from tunneld.errors import NoSuchTunnelError
from tunneld.net import sockets
from tunneld.net.endpoint import Endpoint
from tunneld.net.listeners import ReloadableListener
from tunneld.wire.lines import MAX_REPLY_LINE, ControlRequest, Item, LineBuffer

EVENTS = [{"event": "opened", "id": "t1"}, {"event": "closed", "id": "t1", "reason": "ttl is over"}]


@dataclass
class Script:
    """The `Execute` of the server: it supports a few verbs and records requests and callers."""

    requests: list[ControlRequest] = field(default_factory=list)
    callers: list[Requester] = field(default_factory=list)
    streams: int = 0
    streams_closed: int = 0
    stop: Callable[[], None] = lambda: None

    async def __call__(self, request: ControlRequest, caller: Requester) -> Reply:
        await trio.lowlevel.checkpoint()
        self.requests.append(request)
        self.callers.append(caller)
        match request.verb:
            case "echo":
                return Reply(" ".join(request.args))
            case "list":
                count = int(request.args[0]) if request.args else 2
                return Reply(f"{count} tunnels", [{"id": f"t{number}", "name": "a b"} for number in range(count)])
            case "show":
                raise NoSuchTunnelError(f"no tunnel {request.args[0]}")
            case "bug":
                raise ZeroDivisionError("a secret of the daemon")
            case "unspeakable":
                return Reply(items=[{"id": "t1"}, {"not a key": 1}], stream=self.stream(True))
            case "watch":
                return Reply("watched", items=[{"event": "watching"}], stream=self.stream("once" in request.args))
            case "watch-forever":
                return Reply(stream=self.endless_stream())
            case "watch-and-fail":
                return Reply(stream=self.failing_stream())
            case "shutdown":
                self.stop()
                return Reply("stopping")
            case "quit":
                return Reply("bye", closing=True)
        return Reply()

    async def stream(self, once: bool) -> AsyncGenerator[Sequence[Item], None]:
        """The two events of a watch; then it ends if `once`, or waits until it is closed."""
        self.streams += 1
        try:
            for event in EVENTS:
                yield [event]
            if not once:
                await trio.sleep_forever()
        finally:
            self.streams_closed += 1

    async def endless_stream(self) -> AsyncGenerator[Sequence[Item], None]:
        """Endless large events."""
        self.streams += 1
        try:
            while True:
                yield [{"event": "x" * 10_000}]
        finally:
            self.streams_closed += 1

    async def failing_stream(self) -> AsyncGenerator[Sequence[Item], None]:
        """One event, then an error."""
        yield EVENTS[:1]
        raise NoSuchTunnelError("no tunnel t1")


class LineClient:
    """The client side of a control connection, which sends and reads lines."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self._lines = LineBuffer(MAX_REPLY_LINE)

    async def send(self, text: str | bytes) -> None:
        """Send bytes unchanged, or text as one line."""
        await self.stream.send_all(text if isinstance(text, bytes) else f"{text}\n".encode())

    async def read_line(self) -> str:
        """The next line; empty at the end of the connection."""
        while (line := self._lines.next_line()) is None:
            try:
                data = await self.stream.receive_some(65536)
            except trio.BrokenResourceError:
                return ""
            if not data:
                return ""
            self._lines.feed(data)
        return line.decode()

    async def read_status(self) -> str:
        """The next line that is not an item."""
        while (line := await self.read_line()).startswith("*"):
            pass
        return line

    async def read_all(self) -> list[str]:
        """Everything up to the end of the connection."""
        lines = []
        while line := await self.read_line():
            lines.append(line)
        return lines

    async def request(self, text: str) -> str:
        """Send a line and return the status line of the reply."""
        await self.send(text)
        return await self.read_status()


@dataclass
class Server:
    """A running control server.

    `settings` may be replaced while it runs, as by a reload; cancelling `scope` stops it alone.
    """

    endpoint: Endpoint
    script: Script
    settings: ControlSettings
    scope: trio.CancelScope

    @asynccontextmanager
    async def client(self) -> AsyncIterator[LineClient]:
        """A client that is connected and has read the greeting."""
        async with await connect(self.endpoint) as stream:
            client = LineClient(stream)
            assert (await client.read_line()).startswith("OK tunneld")
            yield client

    async def is_serving(self) -> bool:
        """Whether it serves a new connection."""
        async with self.client() as client:
            return await client.request("echo well") == "OK well"


@asynccontextmanager
async def running_server(
    settings: ControlSettings | None = None,
    tls: ssl.SSLContext | None = None,
    host: str = "127.0.0.1",
    timeout: float = PATIENCE,
    authenticator: Authenticator | None = None,
) -> AsyncIterator[Server]:
    """A control server on a free port of loopback; the `async with` may take `timeout` seconds of the test's clock."""
    door = ReloadableListener("control", sockets.bind_tcp(host, 0))
    endpoint = Endpoint("tls" if tls else "tcp", "127.0.0.1", door.port)
    server = Server(endpoint, Script(), settings or ControlSettings(), trio.CancelScope())
    server.script.stop = server.scope.cancel

    async def serve(task_status: trio.TaskStatus[None]) -> None:
        with server.scope:
            await serve_lines(
                door,
                lambda: server.settings,
                lambda: tls,
                server.script,
                authenticator,
                task_status=task_status,
            )

    with trio.fail_after(timeout):
        async with trio.open_nursery() as nursery:
            await nursery.start(serve)
            yield server
            nursery.cancel_scope.cancel()
