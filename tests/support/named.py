"""A real relay whose tunnels have host names, and an HTTP client that reads responses byte by byte.

visitor ──► names.http of `tunneld`, by Host ──► one `tunnel expose --host NAME` each ──► servers
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio

from tests.support.exposed import agent_of
from tests.support.peers import PATIENCE
from tests.support.programs import Daemon, daemon
from tunneld.net.endpoint import Endpoint

DOMAIN = "t.example.org"

NAMES = """
[names]
domain = "t.example.org"
http = "127.0.0.1:0"
"""


@dataclass
class Named:
    """A relay with host names: `agents` by the first label."""

    relay: Daemon
    port: int
    way: str
    agents: dict[str, trio.Process] = field(default_factory=dict)

    def url(self, path: str = "/") -> str:
        """Return a URL of the shared port; the client has to send the Host itself."""
        return f"http://127.0.0.1:{self.port}{path}"

    async def connect(self) -> trio.SocketStream:
        """Connect as a visitor."""
        return await trio.open_tcp_stream("127.0.0.1", self.port)

    @asynccontextmanager
    async def expose(self, label: str, target: str, *options: str) -> AsyncIterator[trio.Process]:
        """Run an agent for LABEL.t.example.org."""
        where = ["--relay", self.relay.control, "--backend", self.way]
        async with agent_of(target, *where, "--host", label, *options) as (agent, _):
            self.agents[label] = agent
            yield agent


@asynccontextmanager
async def named(
    folder: Path, targets: Mapping[str, str], *options: str, way: str = "webmux", words: str = ""
) -> AsyncIterator[Named]:
    """Run `tunneld`, and an agent for each label of `targets`."""
    async with daemon(folder, words=NAMES + words) as relay, AsyncExitStack() as stack:
        uri = (await relay.wait_logged("names-http listens"))["uri"]
        site = Named(relay, Endpoint.parse(uri).port, way)
        for label, target in targets.items():
            await stack.enter_async_context(site.expose(label, target, *options))
        yield site


@dataclass
class Response:
    """A response as a strict client reads it."""

    status: int
    fields: list[tuple[str, str]]
    body: bytes
    interim: list[int] = field(default_factory=list)

    def __getitem__(self, name: str) -> str | None:
        return next((value for key, value in self.fields if key.lower() == name), None)


class TruncatedError(Exception):
    """The connection ended, or was reset, before the response was complete."""


class ResponseReader:
    """Reads the responses of a connection one by one."""

    def __init__(self, stream: trio.abc.ReceiveStream) -> None:
        self._stream = stream
        self._data = bytearray()

    async def response(self, method: str = "GET") -> Response | None:
        """Read the next response; None where the connection ends cleanly in front of it. Raises `TruncatedError`."""
        interim = []
        while True:
            if not self._data and not await self._more():
                return None
            head = bytes(await self._until(b"\r\n\r\n")).decode("latin-1")
            lines = head[:-4].split("\r\n")
            status = int(lines[0].split(" ")[1])
            if status >= 200 or status == 101:
                break
            interim.append(status)
        fields = [(name, value.strip()) for name, _, value in (line.partition(":") for line in lines[1:])]
        response = Response(status, fields, b"", interim)
        if method != "HEAD" and status not in (101, 204, 304):
            response.body = await self._body(response)
        return response

    async def ended(self) -> bool:
        """Whether nothing but the end of the connection follows."""
        with trio.fail_after(PATIENCE):
            try:
                return not self._data and not await self._more()
            except TruncatedError:
                return True

    async def _body(self, response: Response) -> bytes:
        if response["transfer-encoding"] == "chunked":
            body = b""
            while size := int(await self._until(b"\r\n"), 16):
                body += await self._exactly(size)
                assert await self._exactly(2) == b"\r\n"
            while await self._until(b"\r\n") != b"\r\n":
                pass
            return body
        length = response["content-length"]
        if length is not None:
            return await self._exactly(int(length))
        while await self._more():
            pass
        body, self._data = bytes(self._data), bytearray()
        return body

    async def _more(self) -> bool:
        try:
            with trio.fail_after(PATIENCE):
                chunk = await self._stream.receive_some()
        except trio.BrokenResourceError as error:
            raise TruncatedError(str(error)) from None
        self._data += chunk
        return bool(chunk)

    async def _until(self, delimiter: bytes) -> bytes:
        while (at := self._data.find(delimiter)) < 0:
            if not await self._more():
                raise TruncatedError("the connection ended")
        return await self._exactly(at + len(delimiter))

    async def _exactly(self, count: int) -> bytes:
        while len(self._data) < count:
            if not await self._more():
                raise TruncatedError("the connection ended")
        found = bytes(self._data[:count])
        del self._data[:count]
        return found
