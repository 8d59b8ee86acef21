"""The outermost middleware: headers of every response, the 500 after a bug, and a clean end at shutdown."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

import structlog
import trio
from starlette.datastructures import MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tunneld.http.problems import internal_problem, respond

log = structlog.get_logger("http")

HEADERS = {
    "Cache-Control": "no-store",  # every answer describes the present state
    "X-Content-Type-Options": "nosniff",  # text stays text, even if it quotes a request
    "Cross-Origin-Resource-Policy": "same-origin",  # other sites may not embed an answer
}

FINAL_RESPONSE_TIMEOUT = 1.0
"""Seconds that a request in progress has to finish when the daemon stops, possibly because of this request: its answer
is made and written in several steps, and the stop may come between any two of them.
"""


class LongResponse(Response):
    """A response whose body is sent in pieces of at least `PIECE_BYTES`, so that one of many megabytes does not hold up
    other tasks. A shorter one is sent at once.
    """

    PIECE_BYTES = 256 * 1024

    def __init__(self, parts: Iterable[bytes], media_type: str) -> None:
        """The body is that of all `parts`."""
        self._pieces = [bytearray()]
        for part in parts:
            if len(self._pieces[-1]) >= self.PIECE_BYTES:
                self._pieces.append(bytearray())
            self._pieces[-1] += part
        headers = {"Content-Length": str(sum(map(len, self._pieces)))}
        super().__init__(headers=headers, media_type=media_type)

    async def __call__(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        """Send the response. Starlette calls this."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        *pieces, last = self._pieces
        for piece in pieces:
            await send({"type": "http.response.body", "body": bytes(piece), "more_body": True})
        await send({"type": "http.response.body", "body": bytes(last)})


class ResponseMiddleware:
    """ASGI middleware, the outermost: adds `HEADERS`, turns an unexpected exception into a 500, and lets requests in
    progress finish while the daemon stops.

        request
        └─ deadline     waits for the cancellation, then gives the request `FINAL_RESPONSE_TIMEOUT` seconds
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request. If a response has already begun when an exception comes, the connection is cut."""
        tracker = ResponseTracker(receive, send)
        async with _finish_when_cancelled(tracker):
            try:
                await self._app(scope, tracker.receive, tracker.send)
            except Exception as error:
                log_bug(scope, error)
                if not tracker.has_begun:
                    await respond(scope["path"], internal_problem())(scope, tracker.receive, tracker.send)


class ResponseTracker:
    """The `receive` and `send` of one request, wrapped to follow its progress.

    A response may be sent while the body still arrives, because the request was refused. Hypercorn queues a few pieces
    of the body for the application, and waits for space in that queue even to report that the response is complete.
    Therefore `send` also receives and discards the body until it has ended.

        send
        └─ discard
    """

    def __init__(self, receive: Receive, send: Send) -> None:
        self.has_begun = False
        self.is_streaming = False  # the response has begun and is incomplete
        self._receive = receive
        self._send = send
        self._body_ended = False

    async def receive(self) -> Message:
        """The next piece of the body, or the message that the client has disconnected."""
        message = await self._receive()
        self._body_ended = not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        """Send the next piece of the response."""
        if message["type"] == "http.response.start":
            self.has_begun = True
            MutableHeaders(scope=message).update(HEADERS)
        self.is_streaming = message.get("more_body", False)
        if self._body_ended:
            await self._send(message)
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._discard)
            await self._send(message)
            nursery.cancel_scope.cancel()

    async def _discard(self) -> None:
        while not self._body_ended:
            await self.receive()


@asynccontextmanager
async def _finish_when_cancelled(tracker: ResponseTracker) -> AsyncIterator[None]:
    """Shield a block from cancellation for `FINAL_RESPONSE_TIMEOUT` seconds; a streaming response, which has no end, is
    cancelled at once.
    """
    async with trio.open_nursery() as nursery:
        with trio.CancelScope(shield=True) as shielded:
            nursery.start_soon(_set_deadline_when_cancelled, shielded, tracker)
            yield
        nursery.cancel_scope.cancel()


async def _set_deadline_when_cancelled(shielded: trio.CancelScope, tracker: ResponseTracker) -> None:
    try:
        await trio.sleep_forever()
    finally:
        shielded.deadline = trio.current_time() + (0 if tracker.is_streaming else FINAL_RESPONSE_TIMEOUT)


def log_bug(scope: Scope, error: Exception) -> None:
    """Log an unexpected exception. Called once, where it is turned into an answer."""
    log.error("HTTP request failed: a bug", method=scope["method"], path=scope["path"], exc_info=error)
