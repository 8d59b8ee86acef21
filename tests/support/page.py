"""A web application for hypercorn, to test web protocols through a tunnel: `hypercorn tests.support.page:app`.

PUT  /sha256    the digest of the upload, once it is complete
GET  /events    server-sent events, one for each `POST /tick`
GET  /echo      a WebSocket that echoes messages
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator

import trio
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

ticks, made = trio.open_memory_channel[int](100)


async def sha256(request: Request) -> Response:
    digest = hashlib.sha256()
    async for chunk in request.stream():
        digest.update(chunk)
    return PlainTextResponse(digest.hexdigest())


async def tick(_: Request) -> Response:
    ticks.send_nowait(1)
    return Response()


async def events(_: Request) -> Response:
    async def stream() -> AsyncIterator[bytes]:
        yield b"data: 0\n\n"
        number = 0
        async for one in made:
            number += one
            yield b"data: %d\n\n" % number

    return StreamingResponse(stream(), media_type="text/event-stream")


async def echo(socket: WebSocket) -> None:
    await socket.accept()
    async for text in socket.iter_text():
        await socket.send_text(text)


app = Starlette(
    routes=[
        Route("/sha256", sha256, methods=["PUT"]),
        Route("/tick", tick, methods=["POST"]),
        Route("/events", events),
        WebSocketRoute("/echo", echo),
    ]
)
