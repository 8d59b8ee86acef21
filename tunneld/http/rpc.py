"""The XML-RPC interface, at `/RPC2` and at `/`.

    tunnel.openTunnel([backend] [, {option: value}])      string, the server URI
    tunnel.getTunnelAddress(uri)                          string, the client URI
    tunnel.close(ref)  drain  trim  shutdown              string, what was done
    tunnel.list()  show(ref)  status  penalties  ...      array of structs
    system.listMethods()  system.methodHelp(name)

Every name also works without `tunnel.`. Parameters are strings, integers, and in the last place a struct of options. An
error is a fault: its number is in problems.py, its text is `code: message`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from tunneld.control.commands import COMMANDS, find_command, usage
from tunneld.control.login import AUTH
from tunneld.directory.reply import ITEMS_PER_STEP, Execute
from tunneld.errors import TunneldError, UsageError
from tunneld.http.problems import FAULTS, internal_problem, problem_of
from tunneld.http.responses import LongResponse, log_bug
from tunneld.http.translate import QUIT, WATCH, caller_of, execute_request, make_request
from tunneld.http.xml import ARRAY_BEGIN, ARRAY_END, RpcAnswer, format_answer, format_fault, format_value, parse_call

PREFIX = "tunnel."
ANSWERS_WITH_ITEMS = frozenset(
    {"list", "show", "status", "penalties", "certificates", "credentials", "trycertificate", "reload", "help"}
)
"""Verbs that answer with their items, even if there are none; every other verb answers with its text."""


async def answer_call(request: HttpRequest, body: bytes, execute: Execute) -> Response:
    """Execute one call. An error of any kind becomes an XML-RPC fault."""
    try:
        answer = await _call(request, body, execute)
    except TunneldError as error:
        answer = [_fault(problem_of(error).code, str(error))]
    except Exception as error:
        log_bug(request.scope, error)
        answer = [_fault(internal_problem().code, internal_problem().detail)]
    return LongResponse(answer, "text/xml")


async def _call(request: HttpRequest, body: bytes, execute: Execute) -> Sequence[bytes]:
    """Execute a call; returns the parts of its response."""
    method, params = parse_call(body)
    if method.startswith("system."):
        return [format_answer(_introspect(method, params))]
    args, options = _split(params)
    parsed = make_request(method.removeprefix(PREFIX), args, options)
    if parsed.verb == WATCH:
        raise UsageError("watch does not end, so XML-RPC cannot answer it; use GET /api/v1/watch")
    reply = await execute_request(execute, parsed, caller_of(request.scope))
    if parsed.verb not in ANSWERS_WITH_ITEMS:
        return [format_answer(reply.text)]
    parts = [ARRAY_BEGIN]
    for first in range(0, len(reply.items), ITEMS_PER_STEP):
        async with reply.step():
            parts += map(format_value, reply.items[first : first + ITEMS_PER_STEP])
    return [*parts, ARRAY_END]


def _split(params: Sequence[Any]) -> tuple[Sequence[Any], dict[str, Any]]:
    """The positional parameters, and the options in the struct that follows them."""
    if params and isinstance(params[-1], dict):
        return params[:-1], params[-1]
    return params, {}


def _introspect(method: str, params: Sequence[Any]) -> RpcAnswer:
    """The two introspection calls of XML-RPC."""
    match method, *params:
        case ("system.listMethods",):
            return [f"{PREFIX}{row.verb}" for row in COMMANDS.values() if row.verb not in {AUTH, QUIT, WATCH}]
        case ("system.methodHelp", str(name)):
            row = find_command(name.removeprefix(PREFIX))
            return f"{usage(row)}: {row.summary}"
    raise UsageError(f"unrecognized method {method[:60]!r}; use system.listMethods() or system.methodHelp(name)")


def _fault(code: str, message: str) -> bytes:
    return format_fault(FAULTS.get(code, FAULTS[TunneldError.code]), f"{code}: {message}")
