"""An ASGI application over HTTP/1.1, for requests without a body: h11 reads and writes, and this passes events on.

Hypercorn's server is not used, as in http/connection.py: it leaves connections open that its client has closed.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import Any
from urllib.parse import unquote

import h11
import trio

Application = Callable[[MutableMapping[str, Any], Any, Any], Awaitable[None]]

KEEP_ALIVE_TIMEOUT = 10.0
"""Seconds for the head of a request, counted from the end of the former answer."""
WRITE_TIMEOUT = 60.0
"""Seconds for a visitor to take a piece of an answer: 64 KiB, over the slowest line."""
CLOSE_TIMEOUT = 2.0
"""Seconds for the peer to close after the last answer: a close with unread bytes would reset it."""
MAX_HEAD = 16384
"""Bytes of the head of a request."""
MAX_CONNECTIONS = 1000
"""Connections at once; further ones wait in the backlog. Each may have a file open."""
READ_SIZE = 16384


async def serve_connections(app: Application, listener: trio.SocketListener) -> None:
    """Serve until cancelled, and close the listener."""
    limiter = trio.CapacityLimiter(MAX_CONNECTIONS)

    async def serve_one(stream: trio.SocketStream) -> None:
        async with limiter:
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError, h11.ProtocolError):
                async with stream:
                    await _Conversation(app, stream).run()

    async with listener:
        await trio.serve_listeners(serve_one, [listener])


class _Conversation:
    """The requests of one connection, one after another."""

    def __init__(self, app: Application, stream: trio.SocketStream) -> None:
        self._app = app
        self._stream = stream
        self._body_told = False  # that there is none
        self._connection = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD)

    async def run(self) -> None:
        """Answer requests until the peer closes, is silent for too long, or breaks the protocol."""
        try:
            while (request := await self._next_request()) is not None:
                self._body_told = False
                await self._app(_scope(request), self._receive, self._send)
                if self._connection.states != {h11.CLIENT: h11.DONE, h11.SERVER: h11.DONE}:
                    break
                self._connection.start_next_cycle()
        except h11.RemoteProtocolError as error:
            if self._connection.our_state in {h11.IDLE, h11.SEND_RESPONSE}:
                head = [("Content-Length", "0"), ("Connection", "close")]
                await self._write(h11.Response(status_code=error.error_status_hint, headers=head))
                await self._write(h11.EndOfMessage())
        await self._stream.send_eof()
        with trio.move_on_after(CLOSE_TIMEOUT):
            while await self._stream.receive_some(READ_SIZE):
                pass

    async def _next_request(self) -> h11.Request | None:
        """The head of the next request. A body is not read: the connection ends after an answer to such a request."""
        with trio.move_on_after(KEEP_ALIVE_TIMEOUT):
            while True:
                event = self._connection.next_event()
                if event is h11.NEED_DATA:
                    self._connection.receive_data(await self._stream.receive_some(READ_SIZE))
                elif isinstance(event, h11.Request):
                    if _has_body(event):
                        return event
                    end = self._connection.next_event()
                    assert isinstance(end, h11.EndOfMessage)
                    return event
                else:
                    return None
        return None

    async def _receive(self) -> dict[str, Any]:
        """See ASGI: there is no body, and that the peer has left is found out when something is sent."""
        if self._body_told:
            await trio.sleep_forever()
        self._body_told = True
        return {"type": "http.request", "body": b"", "more_body": False}

    async def _send(self, message: MutableMapping[str, Any]) -> None:
        """See ASGI."""
        if message["type"] == "http.response.start":
            await self._write(h11.Response(status_code=message["status"], headers=list(message.get("headers", ()))))
            return
        if body := message.get("body"):
            await self._write(h11.Data(data=body))
        if not message.get("more_body"):
            await self._write(h11.EndOfMessage())

    async def _write(self, event: h11.Event) -> None:
        data = self._connection.send(event)
        if data:
            with trio.move_on_after(WRITE_TIMEOUT) as writing:
                await self._stream.send_all(data)
            if writing.cancelled_caught:
                raise trio.BrokenResourceError


def _has_body(request: h11.Request) -> bool:
    fields = dict(request.headers)
    return b"transfer-encoding" in fields or fields.get(b"content-length", b"0") != b"0"


def _scope(request: h11.Request) -> dict[str, Any]:
    """The scope of a request, see ASGI."""
    path, _, query = request.target.partition(b"?")
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": request.http_version.decode(),
        "method": request.method.decode(),
        "scheme": "http",
        "path": unquote(path.decode("ascii", "replace"), errors="surrogateescape"),
        "raw_path": path,
        "query_string": query,
        "root_path": "",
        "headers": [(name.lower(), value) for name, value in request.headers],
        "client": None,
        "server": None,
    }
