"""The XML-RPC face, at `/RPC2` and at `/`.

    tunnel.openTunnel([backend] [, {option: value}])      string, the server URI
    tunnel.getTunnelAddress(uri)                          string, the client URI
    tunnel.close(ref)  drain  trim  shutdown              string, what was done
    tunnel.list()  show(ref)  status  reload  help        array of structs
    system.listMethods()  system.methodHelp(name)

Every name works without `tunnel.`, too. Parameters are strings, whole numbers, and a struct of options in the last
place. An error is a fault: its number is in problems.py, its text is `code: message`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from tunneld.control.commands import COMMANDS, find_command, usage
from tunneld.control.login import AUTH
from tunneld.control.reply import Execute
from tunneld.errors import TunneldError, UsageError
from tunneld.http.problems import FAULTS, of_bug, of_error
from tunneld.http.responses import log_bug
from tunneld.http.translate import QUIT, WATCH, build, caller_of, carry_out
from tunneld.http.xml import Answer, format_answer, format_fault, parse_call

PREFIX = "tunnel."
ANSWERS_WITH_ITEMS = frozenset({"list", "show", "status", "reload", "help"})
"""Verbs whose answer is their items, also where there are none; of every other verb it is the text."""


async def answer_call(request: HttpRequest, body: bytes, execute: Execute) -> Response:
    """Carry out one call. Whatever is wrong with it, the answer is XML-RPC."""
    try:
        answer = format_answer(await _call(request, body, execute))
    except TunneldError as error:
        answer = _fault(of_error(error).code, str(error))
    except Exception as error:
        log_bug(request.scope, error)
        answer = _fault(of_bug().code, of_bug().detail)
    return Response(answer, media_type="text/xml")


async def _call(request: HttpRequest, body: bytes, execute: Execute) -> Answer:
    method, params = parse_call(body)
    if method.startswith("system."):
        return _introspect(method, params)
    args, options = _split(params)
    wanted = build(method.removeprefix(PREFIX), args, options)
    if wanted.verb == WATCH:
        raise UsageError("watch has no end, and an XML-RPC answer has one; GET /api/v1/watch instead")
    reply = await carry_out(execute, wanted, caller_of(request.scope))
    return reply.items if wanted.verb in ANSWERS_WITH_ITEMS else reply.text


def _split(params: Sequence[Any]) -> tuple[Sequence[Any], dict[str, Any]]:
    """Positional parameters, and the options in the struct behind them."""
    if params and isinstance(params[-1], dict):
        return params[:-1], params[-1]
    return params, {}


def _introspect(method: str, params: Sequence[Any]) -> Answer:
    """The two calls by which XML-RPC clients look around."""
    match method, *params:
        case ("system.listMethods",):
            return [f"{PREFIX}{row.verb}" for row in COMMANDS.values() if row.verb not in {AUTH, QUIT, WATCH}]
        case ("system.methodHelp", str(name)):
            row = find_command(name.removeprefix(PREFIX))
            return f"{usage(row)}: {row.summary}"
    raise UsageError(f"unrecognized method {method[:60]!r}: there are system.listMethods() and system.methodHelp(name)")


def _fault(code: str, message: str) -> bytes:
    return format_fault(FAULTS.get(code, FAULTS[TunneldError.code]), f"{code}: {message}")
