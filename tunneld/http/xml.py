"""XML-RPC as bytes: calls read, answers written. Pure.

The standard library's marshallers do the types; the parser is our own, because theirs accepts a document type, and
with it entities that grow a few lines into gigabytes. XML-RPC has no use for one, so the first `<!DOCTYPE` ends the
parse.

Values in answers: `string`, `boolean`, `double`, `int` within 32 bits, and beyond those a whole number is a `double`,
exact up to 2^53: octet counters outgrow `int` within the hour, `i8` is an extension that half of the clients refuse,
and a string would have to be parsed by all of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any
from xml.parsers import expat
from xmlrpc.client import MAXINT, MININT, Error, Fault, Unmarshaller, dumps

from tunneld.errors import RemoteProtocolError
from tunneld.http.translate import as_fields
from tunneld.wire.lines import Item, Value

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # XML 1.0 §2.2

Answer = str | Sequence[Item] | Sequence[str]
"""What a call answers: one string, or an array of structs or of strings."""

_BOGUS = (expat.ExpatError, Error, ValueError, TypeError, LookupError, ArithmeticError, AttributeError)
"""What the parser and the tolerant `Unmarshaller` raise on documents that are no XML-RPC; found by fuzzing."""


def parse_call(body: bytes) -> tuple[str, tuple[Any, ...]]:
    """The method's name and its parameters. Raises `RemoteProtocolError`."""
    unmarshaller = Unmarshaller(use_builtin_types=True)
    unmarshaller.xml("", None)  # no encoding: text comes decoded from the parser
    parser = expat.ParserCreate()
    parser.buffer_text = True
    parser.StartElementHandler = unmarshaller.start
    parser.EndElementHandler = unmarshaller.end
    parser.CharacterDataHandler = unmarshaller.data
    parser.StartDoctypeDeclHandler = _refuse_doctype
    try:
        parser.Parse(body, True)
        params = unmarshaller.close()
    except _BOGUS as error:
        raise RemoteProtocolError(f"not an XML-RPC call: {_reason(error)}") from None
    name = unmarshaller.getmethodname()
    if not isinstance(name, str) or not name.strip():
        raise RemoteProtocolError("not an XML-RPC call: it has no method name")
    return name.strip(), params


def format_answer(answer: Answer) -> bytes:
    """A response with one value."""
    return dumps((_plain(answer),), methodresponse=True).encode()


def format_fault(number: int, text: str) -> bytes:
    """A response that is a fault."""
    return dumps(Fault(number, _text(text))).encode()


def _refuse_doctype(*_declaration: object) -> None:
    raise RemoteProtocolError("not an XML-RPC call: it has a DOCTYPE, which is never needed and not read")


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, expat.ExpatError) else "its values are not put together as XML-RPC says"


def _plain(value: Answer | Item | Value) -> Any:
    """What the standard library's marshaller writes as we mean it."""
    match value:
        case Mapping():
            return {key: _plain(inside) for key, inside in as_fields(value).items()}
        case str():
            return _text(value)
        case bool():
            return value
        case int() if not MININT <= value <= MAXINT:
            return float(value)
        case Sequence():
            return [_plain(inside) for inside in value]
    return value


def _text(text: str) -> str:
    """Text without what XML cannot carry."""
    return _NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text)
