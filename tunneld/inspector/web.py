"""The small HTTP server of the inspector's page: h11 on Trio.

    connection ×N
    ├─ request ──► handler ──► answer          within time limits, one after another
    └─ events: answer in pieces                until the page goes away

The HTTP face of the relay uses Starlette and Hypercorn, which the agent's single file does not have.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import parse_qsl

import h11
import trio

from tunneld.log import Logger

MAX_CONNECTIONS: Final = 64
"""Connections to the page at a time. A browser opens six."""
MAX_BODY: Final = 3 << 20
"""Bytes of a request: an edited body in base64, and its header fields."""
RECEIVE_TIMEOUT: Final = 15.0
"""Seconds for a request to arrive."""
IDLE_TIMEOUT: Final = 75.0
"""Seconds between two requests of a connection."""
SEND_TIMEOUT: Final = 30.0
"""Seconds for a browser to take an answer, or a piece of one."""


@dataclass(frozen=True, slots=True)
class PageRequest:
    """A request to the page."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    """By name in lower case; repeated ones are joined with commas."""
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class PageAnswer:
    """An answer: a body, or `pieces` that are sent as they come."""

    status: int = 200
    content_type: str = "text/plain; charset=utf-8"
    body: bytes = b""
    headers: list[tuple[str, str]] = field(default_factory=list)
    pieces: Callable[[], AsyncGenerator[bytes, None]] | None = None


log = Logger("inspector")

Handler = Callable[[PageRequest], Awaitable[PageAnswer]]


class PageServer:
    """Serves a handler on listeners."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self._connections = 0

    async def serve(self, stream: trio.SocketStream) -> None:
        """Serve one connection. Never raises but for bugs."""
        if self._connections >= MAX_CONNECTIONS:
            await trio.aclose_forcefully(stream)
            return
        self._connections += 1
        try:
            await _PageConnection(stream, self._handler).run()
        except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError, h11.ProtocolError):
            pass  # the browser is gone, too slow, or no browser
        except Exception as error:  # a bug must not end the agent
            log.exception("page of the inspector failed: internal error", exc_info=error)
        finally:
            self._connections -= 1
            with trio.move_on_after(1, shield=True):
                await trio.aclose_forcefully(stream)


class _PageConnection:
    """One connection of a browser."""

    def __init__(self, stream: trio.SocketStream, handler: Handler) -> None:
        self._stream = stream
        self._handler = handler
        self._http = h11.Connection(h11.SERVER)

    async def run(self) -> None:
        """Answer requests, one after another."""
        while True:
            try:
                request = await self._receive()
            except h11.RemoteProtocolError as error:
                if self._http.our_state in {h11.IDLE, h11.SEND_RESPONSE}:
                    await self._send(PageAnswer(error.error_status_hint, body=b"not a valid request\n"), "GET")
                return
            if request is None:
                return
            answer = await self._handler(request)
            await self._send(answer, request.method)
            if self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
                return
            self._http.start_next_cycle()

    async def _receive(self) -> PageRequest | None:
        """The next request; None at the end."""
        with trio.move_on_after(IDLE_TIMEOUT) as scope:
            event = await self._next_event()
        if scope.cancelled_caught or not isinstance(event, h11.Request):
            return None
        body = bytearray()
        with trio.fail_after(RECEIVE_TIMEOUT):
            while isinstance(part := await self._next_event(), h11.Data):
                body += part.data
                if len(body) > MAX_BODY:
                    raise h11.RemoteProtocolError("the request is too large", error_status_hint=413)
        headers: dict[str, str] = {}
        for name, value in event.headers:
            key, text = name.decode("latin-1"), value.decode("latin-1")
            headers[key] = f"{headers[key]}, {text}" if key in headers else text
        path, _, query = event.target.decode("latin-1").partition("?")
        return PageRequest(
            event.method.decode(), path, dict(parse_qsl(query, keep_blank_values=True)), headers, bytes(body)
        )

    async def _next_event(self) -> object:
        while True:
            event = self._http.next_event()
            if event is not h11.NEED_DATA:
                return event
            if self._http.they_are_waiting_for_100_continue:
                await self._write(self._http.send(h11.InformationalResponse(status_code=100, headers=[])))
            self._http.receive_data(await self._stream.receive_some())

    async def _send(self, answer: PageAnswer, method: str) -> None:
        length = [] if answer.pieces else [("Content-Length", str(len(answer.body)))]
        headers = [("Content-Type", answer.content_type), *length, *answer.headers]
        await self._write(self._http.send(h11.Response(status_code=answer.status, headers=headers)))
        if method != "HEAD" and answer.pieces is not None:
            await self._stream_pieces(answer.pieces())
            return
        if method != "HEAD":
            await self._write(self._http.send(h11.Data(answer.body)))
        await self._write(self._http.send(h11.EndOfMessage()))

    async def _stream_pieces(self, pieces: AsyncGenerator[bytes, None]) -> None:
        """Send the pieces until the browser closes the connection."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._wait_gone, nursery.cancel_scope)
            nursery.start_soon(self._send_pieces, pieces, nursery.cancel_scope)

    async def _send_pieces(self, pieces: AsyncGenerator[bytes, None], scope: trio.CancelScope) -> None:
        try:
            async with aclosing(pieces):
                async for piece in pieces:
                    await self._write(self._http.send(h11.Data(piece)))
        except (trio.BrokenResourceError, trio.TooSlowError):
            pass
        scope.cancel()

    async def _wait_gone(self, scope: trio.CancelScope) -> None:
        try:
            while await self._stream.receive_some(1024):
                pass  # a browser sends nothing now
        except trio.BrokenResourceError:
            pass
        scope.cancel()

    async def _write(self, data: bytes | None) -> None:
        if data:
            with trio.fail_after(SEND_TIMEOUT):
                await self._stream.send_all(data)
