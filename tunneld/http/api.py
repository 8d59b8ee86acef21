"""The JSON face, under `/api/v1`: the verbs of the line protocol, by the same names.

    GET  /api/v1                       the verbs
    GET  /api/v1/VERB?arg=...          for verbs that only look; `ref`, `uri` and `verb` say the same as `arg`
    POST /api/v1/VERB                  {"args": [...], "options": {...}}, both optional, for every verb

The answer is `{"text": "...", "items": [{...}, ...]}`; of `watch` it is a stream with one JSON object a line, until
the client leaves. A problem is `application/problem+json`, see problems.py.

A reply without an end, as newline-delimited JSON.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from http import HTTPStatus

import trio
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tunneld.control.commands import find_command
from tunneld.control.reply import Execute, Reply
from tunneld.errors import UsageError
from tunneld.http.problems import refuse
from tunneld.http.servlet import once_each
from tunneld.http.translate import as_fields, build, caller_of, carry_out
from tunneld.wire.lines import Item, Request

INDEX = "help"
ARGUMENT_NAMES = frozenset({"arg", "ref", "uri", "verb"})


async def answer_api(request: HttpRequest, body: bytes, execute: Execute) -> Response | LineStream:
    """Carry out one verb. Raises `TunneldError` or `Refused`."""
    verb = _verb(request)
    wanted = _posted(verb, body) if request.method == "POST" else _asked(verb, request)
    return await _respond(request, await carry_out(execute, wanted, caller_of(request.scope)))


def _verb(request: HttpRequest) -> str:
    """The verb in the path: one that there is, and that this method may carry out."""
    verb: str = request.path_params.get("verb", INDEX)
    try:
        command = find_command(verb)
    except UsageError as error:
        raise refuse(HTTPStatus.NOT_FOUND, str(error)) from None
    if command.changes and request.method != "POST":
        detail = f"{command.verb} changes something: POST it, as application/json"
        raise refuse(HTTPStatus.METHOD_NOT_ALLOWED, detail, Allow="POST")
    return command.verb


async def _respond(request: HttpRequest, reply: Reply) -> Response | LineStream:
    if reply.stream is None:
        answer = {"text": reply.text, "items": [as_fields(item) for item in reply.items]}
        return Response(json.dumps(answer) + "\n", media_type="application/json")
    if request.method == "HEAD":
        await reply.stream.aclose()
        return Response(media_type=LineStream.MEDIA_TYPE)
    return LineStream(reply.stream)


def _asked(verb: str, request: HttpRequest) -> Request:
    """The request in a query."""
    pairs = request.query_params.multi_items()
    options = once_each([(name, value) for name, value in pairs if name not in ARGUMENT_NAMES])
    return build(verb, [value for name, value in pairs if name in ARGUMENT_NAMES], options)


def _posted(verb: str, body: bytes) -> Request:
    """The request in a JSON body; none at all is one without arguments."""
    try:
        words = json.loads(body) if body.strip() else {}
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the body is not JSON: {str(error)[:100]}") from None
    match words:
        case {"args": list(args), "options": dict(options)} if len(words) == 2:
            return build(verb, args, options)
        case {"args": list(args)} if len(words) == 1:
            return build(verb, args, {})
        case {"options": dict(options)} if len(words) == 1:
            return build(verb, [], options)
        case {} if not words and isinstance(words, dict):
            return build(verb, [], {})
    raise UsageError('the body is not of the form {"args": [...], "options": {...}}')


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
