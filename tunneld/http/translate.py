"""Translates what HTTP carries to and from the `ControlRequest` and `Item` of the control protocol.

Requests consist of words (tunneld-control(7)), while JSON and XML-RPC have types. A number becomes its digits and a
boolean becomes yes or no. A value without such a form is refused, and so is a word that the control protocol could not
carry.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.types import Scope

from tunneld.directory.reply import Execute, Reply
from tunneld.directory.requester import Requester
from tunneld.errors import UsageError
from tunneld.net.endpoint import join_host_port
from tunneld.policy.access import Grant
from tunneld.wire.lines import MAX_LINE, ControlRequest, Item, Value

QUIT = "quit"
WATCH = "watch"
GRANT = "tunneld.grant"
"""The key of an ASGI scope with the grant of the request."""
RENEW = "tunneld.renew"
"""The key of an ASGI scope with a function that returns the grant at a later time."""
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # controls, halves of surrogate pairs


def make_request(verb: str, args: Sequence[Any], options: Mapping[str, Any]) -> ControlRequest:
    """Make a request. Raises `UsageError` that names the malformed argument or option."""
    return ControlRequest(
        _word(verb, "a verb").lower(),
        tuple(_argument(position, value) for position, value in enumerate(args, start=1)),
        {_word(key, "the name of an option"): _option(key, value) for key, value in options.items()},
    )


async def execute_request(execute: Execute, request: ControlRequest, caller: Requester) -> Reply:
    """Execute a request, except `quit`, which is about the connection itself."""
    if request.verb == QUIT:
        raise UsageError("quit ends a connection of the control protocol; over HTTP, close the connection instead")
    return await execute(request, caller)


def caller_of(scope: Scope) -> Requester:
    """The caller of a request: the address of the connection, never one from a header, and the grant from
    `AuthMiddleware`.
    """
    _, port = scope["client"] or ("", 0)
    host, grant = client_of(scope), grant_of(scope)
    name = f"{grant.name}@" if grant and grant.name else ""
    return Requester(host, f"http {name}{join_host_port(host, port)}", server_of(scope), grant, scope.get(RENEW))


def grant_of(scope: Scope) -> Grant | None:
    """The grant of a request; None if it is unauthenticated."""
    grant: Grant | None = scope.get(GRANT)
    return grant


def client_of(scope: Scope) -> str:
    """The address of the client."""
    host, _port = scope["client"] or ("", 0)
    return bare_address(host)


def server_of(scope: Scope) -> str:
    """Our own address on the connection."""
    host, _port = scope["server"] or ("", 0)
    return bare_address(host)


def bare_address(address: str) -> str:
    """An address without a zone."""
    return address.partition("%")[0]


def as_fields(item: Item) -> dict[str, Value]:
    """An item without the keys that have the value None, as in the control protocol."""
    return {key: value for key, value in item.items() if value is not None}


def _argument(position: int, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise UsageError(f"argument {position} is neither a string nor an integer but {_kind(value)}")
    return _word(str(value), f"argument {position}")


def _option(key: str, value: Any) -> str:
    match value:
        case bool():
            return "yes" if value else "no"
        case str() | int() | float():
            return _word(str(value), f"option {key}")
    raise UsageError(f"option {key} is neither a string, a number nor a boolean but {_kind(value)}")


def _word(value: Any, what: str) -> str:
    """One word, without surrounding white space. Raises `UsageError` that begins with `what`."""
    if not isinstance(value, str):
        raise UsageError(f"not {what}: {_kind(value)}")
    word = value.strip()
    if len(word) > MAX_LINE:
        raise UsageError(f"{what} of {len(word)} characters is longer than {MAX_LINE}")
    if unprintable := _UNPRINTABLE.search(word):
        raise UsageError(f"{what} contains the character U+{ord(unprintable[0]):04X}; use printable text")
    return word


def _kind(value: Any) -> str:
    return {dict: "a struct", list: "an array", bool: "a boolean", float: "a fraction", type(None): "null"}.get(
        type(value), f"a {type(value).__name__}"
    )
