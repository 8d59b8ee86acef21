"""What every request and every response has around it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import structlog
import trio
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tunneld.http.problems import of_bug, respond

log = structlog.get_logger("http")

HEADERS = {
    "Cache-Control": "no-store",  # every answer is about this moment
    "X-Content-Type-Options": "nosniff",  # text is text, also where it repeats what a request said
    "Cross-Origin-Resource-Policy": "same-origin",  # other sites may not even embed an answer
}


LAST_WORDS = 1.0
"""Seconds for a request that is being carried out when we are ended, perhaps by this very request: its answer is made
and written in several steps, and the end may come between any two of them.
"""


class ResponseMiddleware:
    """ASGI middleware, the outermost: adds `HEADERS`, turns an exception that nobody meant into a 500, and has what has
    begun be answered also while the daemon ends.

        request
        └─ hurry
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request. Where a response has begun already, ending here cuts the connection."""
        if scope["type"] != "http":
            await send({"type": "websocket.close"})
            return
        exchange = ResponseTracker(receive, send)
        async with _last_words(exchange):
            try:
                await self._app(scope, exchange.receive, exchange.send)
            except Exception as error:
                log_bug(scope, error)
                if not exchange.begun:
                    await respond(scope["path"], of_bug())(scope, exchange.receive, exchange.send)


class ResponseTracker:
    """One request and its response.

    A response may go out while the body still comes in: it was refused. Hypercorn queues a few pieces of it for the
    application, and waits for room in that queue even to say that the response is complete; so as long as the body has
    not ended, whoever sends also takes what comes, and drops it.

        send
        └─ discard
    """

    def __init__(self, receive: Receive, send: Send) -> None:
        self.begun = False
        self.streams = False  # more is to come, whenever it comes
        self._receive = receive
        self._send = send
        self._body_ended = False

    async def receive(self) -> Message:
        """The next piece of the body, or the news that the client left."""
        message = await self._receive()
        self._body_ended = not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        """The next piece of the response."""
        if message["type"] == "http.response.start":
            self.begun = True
            MutableHeaders(scope=message).update(HEADERS)
        self.streams = message.get("more_body", False)
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
async def _last_words(exchange: ResponseTracker) -> AsyncIterator[None]:
    """Who is cancelled has `LAST_WORDS` seconds for what is in this block, but not for a stream, which has no end."""
    async with trio.open_nursery() as nursery:
        with trio.CancelScope(shield=True) as shielded:
            nursery.start_soon(_hurry, shielded, exchange)
            yield
        nursery.cancel_scope.cancel()


async def _hurry(shielded: trio.CancelScope, exchange: ResponseTracker) -> None:
    try:
        await trio.sleep_forever()
    finally:
        shielded.deadline = trio.current_time() + (0 if exchange.streams else LAST_WORDS)


def log_bug(scope: Scope, error: Exception) -> None:
    """Log an exception that is a bug, once, where it is turned into an answer."""
    log.error("http request failed", method=scope["method"], path=scope["path"], exc_info=error)
