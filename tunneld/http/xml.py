"""XML-RPC: parses calls and formats answers. Pure.

The standard library marshals the types. The parser is our own, because theirs accepts a document type, and with it
entities that expand a few lines to gigabytes. XML-RPC does not need one, so the first `<!DOCTYPE` ends the parse.

Values in answers are `string`, `boolean`, `double`, and `int` within 32 bits. A larger integer becomes a `double`,
exact up to 2^53: byte counters exceed `int` within an hour, half of the clients refuse the extension `i8`, and all
clients would have to parse a string.
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

RpcAnswer = str | Sequence[str]
"""The answer to a call: one string, or an array of strings. An array of structs is formatted value by value."""

_PARSE_ERRORS = (expat.ExpatError, Error, ValueError, TypeError, LookupError, ArithmeticError, AttributeError)
"""What the parser and the lenient `Unmarshaller` raise for documents that are not XML-RPC; found by fuzzing."""


def parse_call(body: bytes) -> tuple[str, tuple[Any, ...]]:
    """The name of the method and its parameters. Raises `RemoteProtocolError`."""
    unmarshaller = Unmarshaller(use_builtin_types=True)
    unmarshaller.xml("", None)  # no encoding: the parser returns decoded text
    parser = expat.ParserCreate()
    parser.buffer_text = True
    parser.StartElementHandler = unmarshaller.start
    parser.EndElementHandler = unmarshaller.end
    parser.CharacterDataHandler = unmarshaller.data
    parser.StartDoctypeDeclHandler = _refuse_doctype
    try:
        parser.Parse(body, True)
        params = unmarshaller.close()
    except _PARSE_ERRORS as error:
        raise RemoteProtocolError(f"not an XML-RPC call: {_reason(error)}") from None
    name = unmarshaller.getmethodname()
    if not isinstance(name, str) or not name.strip():
        raise RemoteProtocolError("not an XML-RPC call: it has no method name")
    return name.strip(), params


def format_answer(answer: RpcAnswer) -> bytes:
    """A response with one value."""
    return dumps((_marshallable(answer),), methodresponse=True).encode()


def format_value(item: Item) -> bytes:
    """One struct of an array, between `ARRAY_BEGIN` and `ARRAY_END`."""
    return dumps((_marshallable(item),)).removeprefix(_PARAMS[0]).removesuffix(_PARAMS[1]).encode()


def format_fault(number: int, text: str) -> bytes:
    """A response that is a fault."""
    return dumps(Fault(number, _text(text))).encode()


_PARAMS = ("<params>\n<param>\n", "</param>\n</params>\n")
"""What the standard library puts around a single value."""
ARRAY_BEGIN, ARRAY_END = dumps(([None],), methodresponse=True, allow_none=True).encode().split(b"<value><nil/></value>")
"""What it puts around the values of an array in a response."""


def _refuse_doctype(*_declaration: object) -> None:
    raise RemoteProtocolError("not an XML-RPC call: it has a DOCTYPE, which is not accepted")


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, expat.ExpatError) else "its structure is not that of XML-RPC"


def _marshallable(value: RpcAnswer | Item | Value) -> Any:
    """The value in the form that the standard library marshals as described above."""
    match value:
        case Mapping():
            return {key: _marshallable(inside) for key, inside in as_fields(value).items()}
        case str():
            return _text(value)
        case bool():
            return value
        case int() if not MININT <= value <= MAXINT:
            return float(value)
        case Sequence():
            return [_marshallable(inside) for inside in value]
    return value


def _text(text: str) -> str:
    """Text with U+FFFD for characters that XML cannot carry."""
    return _NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text)
