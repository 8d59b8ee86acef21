"""The JSON interface under `/api/v1`: the verbs of the control protocol, by the same names.

    GET  /api/v1                       the verbs
    GET  /api/v1/VERB?arg=...          verbs that change nothing; `ref`, `uri` and `verb` are synonyms of `arg`
    POST /api/v1/VERB                  {"args": [...], "options": {...}}, both optional, for every verb

The answer is `{"text": "...", "items": [{...}, ...]}`. The answer to `watch` is a stream of newline-delimited JSON, one
object per event, until the client closes. An error is `application/problem+json`, see problems.py.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from http import HTTPStatus

import trio
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tunneld.control.commands import find_command
from tunneld.directory.reply import ITEMS_PER_STEP, Execute, Reply, Step
from tunneld.errors import UsageError
from tunneld.http.problems import http_error
from tunneld.http.responses import LongResponse
from tunneld.http.servlet import unique_parameters
from tunneld.http.translate import as_fields, caller_of, execute_request, make_request
from tunneld.wire.lines import ControlRequest, Item

DEFAULT_VERB = "help"
ARGUMENT_NAMES = frozenset({"arg", "ref", "uri", "verb"})
"""Query parameters that are arguments; every other one is an option."""


async def answer_api(request: HttpRequest, body: bytes, execute: Execute) -> Response | LineStream:
    """Execute one verb. Raises `TunneldError` or `HttpError`."""
    verb = _verb(request)
    parsed = _from_body(verb, body) if request.method == "POST" else _from_query(verb, request)
    return await _respond(request, await execute_request(execute, parsed, caller_of(request.scope)))


def _verb(request: HttpRequest) -> str:
    """The verb in the path. Raises `HttpError` if it does not exist or needs another method."""
    verb: str = request.path_params.get("verb", DEFAULT_VERB)
    try:
        command = find_command(verb)
    except UsageError as error:
        raise http_error(HTTPStatus.NOT_FOUND, str(error)) from None
    if command.changes and request.method != "POST":
        detail = f"{command.verb} changes something; use POST with the content type application/json"
        raise http_error(HTTPStatus.METHOD_NOT_ALLOWED, detail, Allow="POST")
    return command.verb


async def _respond(request: HttpRequest, reply: Reply) -> Response | LineStream:
    if reply.stream is None:
        return LongResponse(await _format(reply), "application/json")
    if request.method == "HEAD":
        await reply.stream.aclose()
        return Response(media_type=LineStream.MEDIA_TYPE)
    return LineStream(reply.stream, reply.step)


async def _format(reply: Reply) -> Sequence[bytes]:
    """The parts of the reply as JSON, formatted in steps."""
    parts = [f'{{"text": {json.dumps(reply.text)}, "items": ['.encode()]
    for first in range(0, len(reply.items), ITEMS_PER_STEP):
        async with reply.step():
            items = reply.items[first : first + ITEMS_PER_STEP]
            text = ", ".join(json.dumps(as_fields(item)) for item in items)
            parts.append((f", {text}" if first else text).encode())
    return [*parts, b"]}\n"]


def _from_query(verb: str, request: HttpRequest) -> ControlRequest:
    pairs = request.query_params.multi_items()
    options = unique_parameters([(name, value) for name, value in pairs if name not in ARGUMENT_NAMES])
    return make_request(verb, [value for name, value in pairs if name in ARGUMENT_NAMES], options)


def _from_body(verb: str, body: bytes) -> ControlRequest:
    """The request in a JSON body; an empty body is a request without arguments."""
    try:
        parsed = json.loads(body) if body.strip() else {}
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the body is not JSON: {str(error)[:100]}") from None
    match parsed:
        case {"args": list(args), "options": dict(options)} if len(parsed) == 2:
            return make_request(verb, args, options)
        case {"args": list(args)} if len(parsed) == 1:
            return make_request(verb, args, {})
        case {"options": dict(options)} if len(parsed) == 1:
            return make_request(verb, [], options)
        case {} if not parsed and isinstance(parsed, dict):
            return make_request(verb, [], {})
    raise UsageError('the body is not of the form {"args": [...], "options": {...}}')


class LineStream:
    """An ASGI response that sends one line per item until the client closes. Then it closes the generator.

    request
    └─ listener     waits until the client closes, and then cancels the writer
    """

    MEDIA_TYPE = "application/x-ndjson"

    def __init__(self, items: AsyncGenerator[Sequence[Item], None], step: Step) -> None:
        self._items = items
        self._step = step

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response. Starlette calls this."""
        async with aclosing(self._items), trio.open_nursery() as nursery:
            nursery.start_soon(_cancel_on_disconnect, receive, nursery.cancel_scope)
            await self._write(send)
            nursery.cancel_scope.cancel()

    async def _write(self, send: Send) -> None:
        headers = [(b"content-type", self.MEDIA_TYPE.encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async for items in self._items:
            async with self._step():
                lines = "".join(json.dumps(as_fields(item)) + "\n" for item in items).encode()
            await send({"type": "http.response.body", "body": lines, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _cancel_on_disconnect(receive: Receive, writer: trio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    writer.cancel()
