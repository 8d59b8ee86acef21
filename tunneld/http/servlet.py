"""The two calls of the original interface as a GET, as NeuroGrid asked it of a Tristero node.

    /tristero/servlet/tunnel?method=openTunnel[&backend=tcp][&persist=yes]...     the server URI and a line end
    /tristero/servlet/tunnel?method=getTunnelAddress&uri=tcp://...                the client URI and a line end

A POST may carry the same parameters as a form.
"""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus
from urllib.parse import parse_qsl

from starlette.requests import Request as HttpRequest
from starlette.responses import PlainTextResponse, Response

from tunneld.directory.reply import Execute
from tunneld.errors import UsageError
from tunneld.http.problems import http_error
from tunneld.http.translate import caller_of, execute_request, make_request

ARGUMENTS = {"opentunnel": "backend", "gettunneladdress": "uri"}
"""The parameter that is the argument of each call; every other parameter but `method` is an option."""


async def answer_servlet(request: HttpRequest, body: bytes, execute: Execute) -> Response:
    """Execute one of the two calls. Raises `TunneldError` or `HttpError`."""
    if request.method == "HEAD":
        raise http_error(
            HTTPStatus.METHOD_NOT_ALLOWED, "HEAD must not change anything; use GET or POST", Allow="GET, POST"
        )
    fields = unique_parameters([*request.query_params.multi_items(), *_form(body)])
    method = fields.pop("method", "").strip()
    if not method:
        raise UsageError("parameter 'method' is missing; add ?method=openTunnel or ?method=getTunnelAddress&uri=URI")
    name = ARGUMENTS.get(method.lower())
    if name is None:
        raise http_error(
            HTTPStatus.NOT_FOUND, f"unrecognized method {method[:60]!r}; use openTunnel or getTunnelAddress"
        )
    argument = fields.pop(name, None)
    parsed = make_request(method, [] if argument is None else [argument], fields)
    reply = await execute_request(execute, parsed, caller_of(request.scope))
    return PlainTextResponse(f"{reply.text}\n")


def unique_parameters(pairs: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Parameters by name. Raises `UsageError` if one occurs twice."""
    fields: dict[str, str] = {}
    for name, value in pairs:
        if name in fields:
            raise UsageError(f"parameter {name[:60]!r} is given twice; give it once")
        fields[name] = value
    return fields


def _form(body: bytes) -> list[tuple[str, str]]:
    return parse_qsl(body.decode(errors="replace"), keep_blank_values=True)
