"""The JSON face, under `/api/v1`: the verbs of the line protocol, by the same names.

    GET  /api/v1                       the verbs
    GET  /api/v1/VERB?arg=...          for verbs that only look; `ref`, `uri` and `verb` say the same as `arg`
    POST /api/v1/VERB                  {"args": [...], "options": {...}}, both optional, for every verb

The answer is `{"text": "...", "items": [{...}, ...]}`; of `watch` it is a stream with one JSON object a line, until
the client leaves. A problem is `application/problem+json`, see problems.py.
"""

from __future__ import annotations

import json
from http import HTTPStatus

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from tunneld.control.commands import find_command
from tunneld.control.http.problems import refuse
from tunneld.control.http.servlet import once_each
from tunneld.control.http.stream import LineStream
from tunneld.control.http.words import as_fields, build, caller_of, carry_out
from tunneld.control.reply import Execute, Reply
from tunneld.errors import UsageError
from tunneld.wire.lines import Request

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
