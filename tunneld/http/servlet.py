"""The two calls as a GET, as NeuroGrid made it of a Tristero node.

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

from tunneld.control.reply import Execute
from tunneld.errors import UsageError
from tunneld.http.problems import refuse
from tunneld.http.translate import build, caller_of, carry_out

ARGUMENTS = {"opentunnel": "backend", "gettunneladdress": "uri"}
"""The parameter that is the argument of each call; every other parameter but `method` is an option."""


async def answer_servlet(request: HttpRequest, body: bytes, execute: Execute) -> Response:
    """Carry out one of the two calls. Raises `TunneldError` or `Refused`."""
    if request.method == "HEAD":
        raise refuse(HTTPStatus.METHOD_NOT_ALLOWED, "HEAD may not change anything; send GET or POST", Allow="GET, POST")
    fields = once_each([*request.query_params.multi_items(), *_form(body)])
    method = fields.pop("method", "").strip()
    if not method:
        raise UsageError("no method is given: add ?method=openTunnel or ?method=getTunnelAddress&uri=URI")
    name = ARGUMENTS.get(method.lower())
    if name is None:
        raise refuse(HTTPStatus.NOT_FOUND, f"no method {method[:60]!r} here: there are openTunnel and getTunnelAddress")
    argument = fields.pop(name, None)
    wanted = build(method, [] if argument is None else [argument], fields)
    reply = await carry_out(execute, wanted, caller_of(request.scope))
    return PlainTextResponse(f"{reply.text}\n")


def once_each(pairs: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Parameters by name. Raises `UsageError` where one is given twice."""
    fields: dict[str, str] = {}
    for name, value in pairs:
        if name in fields:
            raise UsageError(f"parameter {name[:60]!r} is given twice; give it once")
        fields[name] = value
    return fields


def _form(body: bytes) -> list[tuple[str, str]]:
    return parse_qsl(body.decode(errors="replace"), keep_blank_values=True)
