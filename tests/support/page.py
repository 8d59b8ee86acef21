"""A web application for hypercorn, to test web protocols through a tunnel: `hypercorn tests.support.page:app`.

GET  /          a page with a stylesheet and PICTURES pictures
GET  /whose/N   N and the word LABEL of the environment
PUT  /sha256    the digest of the upload, once it is complete
GET  /events    server-sent events, one for each `POST /tick`
GET  /echo      a WebSocket that echoes messages
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import AsyncIterator

import trio
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

LABEL = os.environ.get("LABEL", "")
PICTURES = 12
HEAD = f"""<!DOCTYPE html><meta charset="utf-8"><title>{LABEL}</title><link rel="stylesheet" href="/style.css">
<h1>{LABEL}</h1><p>served by a machine that only dials out</p>
"""
STYLE = "body { font: 20px sans-serif; margin: 40px; background: #f4f1ea } img { width: 48px; margin: 4px }"
PICTURE = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 10 10">
<circle cx="5" cy="5" r="4" fill="hsl(%d 60%% 50%%)"/></svg>"""

ticks, made = trio.open_memory_channel[int](100)


async def page(_: Request) -> Response:
    return HTMLResponse(HEAD + "".join(f'<img src="/picture/{number}.svg">' for number in range(PICTURES)))


async def style(_: Request) -> Response:
    return Response(STYLE, media_type="text/css")


async def picture(request: Request) -> Response:
    return Response(PICTURE % (request.path_params["number"] * 30), media_type="image/svg+xml")


async def whose(request: Request) -> Response:
    return PlainTextResponse(f"{request.path_params['number']} {LABEL}")


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
        Route("/", page),
        Route("/style.css", style),
        Route("/picture/{number:int}.svg", picture),
        Route("/whose/{number:int}", whose),
        Route("/sha256", sha256, methods=["PUT"]),
        Route("/tick", tick, methods=["POST"]),
        Route("/events", events),
        WebSocketRoute("/echo", echo),
    ]
)
