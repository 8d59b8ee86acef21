"""From what HTTP carries to the `Request` that every face carries out.

Requests are words (tunneld-control(7)), while JSON and XML-RPC have types. A number becomes its digits and a truth
value becomes yes or no; what has no such form is refused here, and so is every word that could not be typed in the
line protocol.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.types import Scope

from tunneld.control.reply import Execute, Reply
from tunneld.directory.requester import Requester
from tunneld.errors import UsageError
from tunneld.net.endpoint import join_host_port, unmap
from tunneld.policy.access import Grant
from tunneld.wire.lines import MAX_LINE, Item, Request, Value

QUIT = "quit"
WATCH = "watch"
GRANT = "tunneld.grant"
"""Where an ASGI scope keeps what its request may do,"""
RENEW = "tunneld.renew"
"""and where, how to ask that again."""
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # controls, halves of surrogate pairs


def build(verb: str, args: Sequence[Any], options: Mapping[str, Any]) -> Request:
    """Make the request. Raises `UsageError` naming the argument or option that is none."""
    return Request(
        _word(verb, "a verb").lower(),
        tuple(_argument(position, value) for position, value in enumerate(args, start=1)),
        {_word(key, "the name of an option"): _option(key, value) for key, value in options.items()},
    )


async def carry_out(execute: Execute, request: Request, caller: Requester) -> Reply:
    """Carry out a request, except for the one verb that is about the connection itself."""
    if request.verb == QUIT:
        raise UsageError("quit ends a connection of the line protocol; over HTTP close the connection instead")
    return await execute(request, caller)


def caller_of(scope: Scope) -> Requester:
    """Who asks: an address from what the HTTP server knows of the connection, never from a header, and the grant that
    `Porter` found.
    """
    _, port = scope["client"] or ("", 0)
    host, grant = client_of(scope), grant_of(scope)
    name = f"{grant.name}@" if grant and grant.name else ""
    return Requester(host, f"http {name}{join_host_port(host, port)}", server_of(scope), grant, scope.get(RENEW))


def grant_of(scope: Scope) -> Grant | None:
    """What this request may do; None for a stranger."""
    grant: Grant | None = scope.get(GRANT)
    return grant


def client_of(scope: Scope) -> str:
    """The address that the request came from."""
    host, _port = scope["client"] or ("", 0)
    return plain(host)


def server_of(scope: Scope) -> str:
    """Our address on which the request came in."""
    host, _port = scope["server"] or ("", 0)
    return plain(host)


def plain(address: str) -> str:
    """An address without the zone of a link and without the IPv6 around an IPv4 one."""
    return unmap(address.partition("%")[0])


def as_fields(item: Item) -> dict[str, Value]:
    """An item as its reader sees it: a key whose value is None is left out, as in the line protocol."""
    return {key: value for key, value in item.items() if value is not None}


def _argument(position: int, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise UsageError(f"argument {position} is neither a string nor a whole number but {_kind(value)}")
    return _word(str(value), f"argument {position}")


def _option(key: str, value: Any) -> str:
    match value:
        case bool():
            return "yes" if value else "no"
        case str() | int() | float():
            return _word(str(value), f"option {key}")
    raise UsageError(f"option {key} is neither a string, a number nor a truth value but {_kind(value)}")


def _word(value: Any, what: str) -> str:
    """One word, without the blanks and the line end around it."""
    if not isinstance(value, str):
        raise UsageError(f"not {what}: {_kind(value)}")
    word = value.strip()
    if len(word) > MAX_LINE:
        raise UsageError(f"{what} of {len(word)} characters is longer than {MAX_LINE}")
    if unfit := _UNPRINTABLE.search(word):
        raise UsageError(f"{what} has the character U+{ord(unfit[0]):04X}; send printable text")
    return word


def _kind(value: Any) -> str:
    return {dict: "a struct", list: "an array", bool: "a truth value", float: "a fraction", type(None): "nothing"}.get(
        type(value), f"a {type(value).__name__}"
    )
