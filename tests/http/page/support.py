"""A browser's part of a session, without a browser; and one stream of the page."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import h11
import trio

from tests.http.support import HttpAnswer, HttpRelay
from tests.support.credentials import SECRET

HTML = "text/html,application/xhtml+xml,*/*;q=0.8"


@dataclass
class Tab:
    """A page that is logged in, or not yet."""

    relay: HttpRelay
    cookie: str = ""
    token: str = ""

    @property
    def headers(self) -> dict[str, str]:
        """What the page and its browser send with each request."""
        sent = {"origin": f"http://{self.relay.authority}", "sec_fetch_site": "same-origin"}
        return (
            sent
            | ({"cookie": self.cookie} if self.cookie else {})
            | ({"x_tunneld_token": self.token} if self.token else {})
        )

    async def get(self, path: str, **headers: str) -> HttpAnswer:
        return await self.relay.request("GET", path, b"", **(self.headers | headers))

    async def post(self, path: str, content: Any = None, **headers: str) -> HttpAnswer:
        body = json.dumps(content if content is not None else {}).encode()
        return await self.relay.request("POST", path, body, content_type="application/json", **(self.headers | headers))

    async def verb(self, verb: str, *args: str) -> HttpAnswer:
        return await self.post(f"/api/v1/{verb}", {"args": list(args)})

    async def log_in(self, name: str, secret: str = SECRET) -> HttpAnswer:
        answer = await self.post("/page/login", {"name": name, "secret": secret})
        if answer.status == 200:
            self.token = answer.json["token"]
            self.cookie = answer.headers["set-cookie"].partition(";")[0]
        return answer


@dataclass
class Messages:
    """The messages of one stream."""

    stream: trio.SocketStream
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    _reader: h11.Connection = field(default_factory=lambda: h11.Connection(h11.CLIENT))
    _pending: str = ""
    last_id: str = ""

    async def next(self, wanted: str) -> Any:
        """The data of the next message of this kind."""
        while True:
            event, data = await self._next()
            if event == wanted:
                return data

    async def _next(self) -> tuple[str, Any]:
        while "\n\n" not in self._pending:
            match self._reader.next_event():
                case h11.NEED_DATA:
                    self._reader.receive_data(bytes(await self.stream.receive_some(65536)))
                case h11.Response(status_code=self.status, headers=headers):
                    self.headers = {name.decode(): value.decode() for name, value in headers}
                case h11.Data(data=data):
                    self._pending += data.decode()
                case h11.EndOfMessage():
                    return "", None
        message, _, self._pending = self._pending.partition("\n\n")
        fields = dict(line.split(": ", 1) for line in message.split("\n"))
        self.last_id = fields.get("id", self.last_id)
        return fields["event"], json.loads(fields["data"])

    async def begin(self, path: str, headers: dict[str, str]) -> None:
        self._reader.send(h11.Request(method="GET", target=path, headers=list(headers.items())))
        self._reader.send(h11.EndOfMessage())
        lines = [f"GET {path} HTTP/1.1", *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items())]
        await self.stream.send_all("\r\n".join([*lines, "", ""]).encode())


@asynccontextmanager
async def streaming(tab: Tab, tunnel: str = "", last_id: str = "") -> AsyncIterator[Messages]:
    """The stream of a page."""
    more = {"last-event-id": last_id} if last_id else {}
    async with await tab.relay.connect() as stream:
        messages = Messages(stream)
        await messages.begin(f"/page/stream?tunnel={tunnel}", {"host": tab.relay.authority} | tab.headers | more)
        yield messages
