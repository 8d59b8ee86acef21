"""A reply without an end, as newline-delimited JSON."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing

import trio
from starlette.types import Receive, Scope, Send

from tunneld.control.http.words import as_fields
from tunneld.wire.lines import Item


class LineStream:
    """An ASGI response: one line an item, until the client leaves; then the stream is closed.

    request
    └─ listener     waits for the client to leave and then cancels the writer
    """

    MEDIA_TYPE = "application/x-ndjson"

    def __init__(self, items: AsyncGenerator[Item, None]) -> None:
        self._items = items

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        async with aclosing(self._items), trio.open_nursery() as nursery:
            nursery.start_soon(_cancel_when_left, receive, nursery.cancel_scope)
            await self._write(send)
            nursery.cancel_scope.cancel()

    async def _write(self, send: Send) -> None:
        headers = [(b"content-type", self.MEDIA_TYPE.encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async for item in self._items:
            line = json.dumps(as_fields(item)).encode() + b"\n"
            await send({"type": "http.response.body", "body": line, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _cancel_when_left(receive: Receive, writer: trio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    writer.cancel()
