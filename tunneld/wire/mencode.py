"""mencode, the encoding of EGTP messages (Mojo Nation, 2002): a typed subset of canonical s-expressions. Pure.

Every value is a list whose first atom is its type; an atom is `<length>:<octets>` without leading zeros:

    None            (4:null)
    integer         (3:int<atom>)       the atom is decimal: 0, or no leading zero and perhaps a minus sign
    octet string    (6:string<atom>)
    list            (4:list<value>...)
    dictionary      (4:dict<key><value>...)

The keys of a dictionary are integers and strings, strictly ascending, integers first. So every value has exactly one
encoding, and `encode(decode(data)) == data` for all that `decode` accepts and that has no unknown types. There are no
fractions, no booleans and no text: Python's `bool`, `float` and `str` are refused.

An unknown type is an error at the top (`UnknownTypeError`), an `UnknownValue` inside a list, and skipped together with
its key inside a dictionary: later versions of a protocol may add keys. The original also reads white space before a
length (`( 4:null)`); we do not.

The original has no limits. Ours bound depth, digits and values (`MencodeLimits`), and `decode` looks at every octet at
most twice, so the cost of any input is linear. `encode` keeps the same limits: what we send, we would accept.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

from tunneld.errors import LocalProtocolError, RemoteProtocolError

Key: TypeAlias = int | bytes
Value: TypeAlias = "int | bytes | list[Value] | dict[Key, Value] | UnknownValue | None"


@dataclass(frozen=True, slots=True)
class MencodeLimits:
    """How large a value may be.

    `depth` counts lists and dictionaries inside each other; a relayed address needs 6. `integer_digits` is enough for
    256 bits. `values` bounds the time and the memory per message: 65,536 need about 0.1 s and 10 MiB.
    """

    depth: int = 32
    integer_digits: int = 78
    values: int = 65_536


DEFAULT_LIMITS = MencodeLimits()

MAX_LENGTH_DIGITS = 7
"""Digits of the length of an atom: 4 MiB, the largest message, has 7."""


class MencodeError(RemoteProtocolError):
    """The input is not the encoding of a value, or is larger than the limits. The message names the octet."""


class UnknownTypeError(MencodeError):
    """The input is a value of a type that is not known."""


@dataclass(frozen=True, slots=True)
class UnknownValue:
    """Stands in a decoded list for a value of an unknown type. It cannot be encoded."""

    type_name: bytes


_ATOM = re.compile(rb"(0|[1-9][0-9]{0,%d}):" % (MAX_LENGTH_DIGITS - 1))
_KNOWN = re.compile(rb"\((?:(4:null\))|(6:string)|(3:int)|(4:list)|(4:dict))")
_NULL, _STRING, _INTEGER, _LIST, _DICTIONARY = 1, 2, 3, 4, 5
_DECIMAL = re.compile(rb"0|-?[1-9][0-9]*")
_OPEN, _CLOSE = b"()"


def encode(value: Value, limits: MencodeLimits = DEFAULT_LIMITS) -> bytes:
    """Return the encoding of a value. Raises `LocalProtocolError` if it has none, or is larger than the limits."""
    encoder = _Encoder(limits)
    encoder.add(value, 0)
    return b"".join(encoder.parts)


def decode(data: bytes, limits: MencodeLimits = DEFAULT_LIMITS) -> Value:
    """Return the value whose encoding is all of `data`. Raises `MencodeError`."""
    decoder = _Decoder(data, limits)
    value, end = decoder.value(0, 0)
    if isinstance(value, UnknownValue):
        raise UnknownTypeError(f"mencode value of the unknown type {_excerpt(value.type_name)}")
    if end != len(data):
        raise MencodeError(f"mencode octet {end}: the value has ended, but {len(data) - end} octets follow")
    return value


def order(key: Key) -> tuple[bool, Key]:
    """The sort key of dictionary keys: integers before strings."""
    return isinstance(key, bytes), key


class _Encoder:
    """Collects the encoding of a value in `parts`."""

    def __init__(self, limits: MencodeLimits) -> None:
        self.parts: list[bytes] = []
        self._limits = limits
        self._values_left = limits.values

    def add(self, value: Value, depth: int) -> None:
        self._values_left -= 1
        if self._values_left < 0:
            raise LocalProtocolError(f"message has more than {self._limits.values} values")
        if isinstance(value, bytes):
            self.parts.append(b"(6:string%d:%b)" % (len(value), value))
        elif isinstance(value, int) and not isinstance(value, bool):
            self._add_integer(value)
        elif isinstance(value, dict):
            self._check_depth(depth)
            self.parts.append(b"(4:dict")
            for key in sorted(self._keys(value), key=order):
                self.add(key, depth + 1)
                self.add(value[key], depth + 1)
            self.parts.append(b")")
        elif isinstance(value, list):
            self._check_depth(depth)
            self.parts.append(b"(4:list")
            for item in value:
                self.add(item, depth + 1)
            self.parts.append(b")")
        elif value is None:
            self.parts.append(b"(4:null)")
        else:
            raise LocalProtocolError(f"mencode has no type for {type(value).__name__}")

    def _add_integer(self, value: int) -> None:
        limit = self._limits.integer_digits
        if value.bit_length() > 4 * limit or len(digits := b"%d" % value) - (value < 0) > limit:
            raise LocalProtocolError(f"integer has more than {limit} digits")
        self.parts.append(b"(3:int%d:%b)" % (len(digits), digits))

    def _check_depth(self, depth: int) -> None:
        if depth >= self._limits.depth:
            raise LocalProtocolError(f"message is nested deeper than {self._limits.depth} levels")

    def _keys(self, dictionary: dict[Key, Value]) -> Iterator[Key]:
        for key in dictionary:
            if not isinstance(key, int | bytes) or isinstance(key, bool):
                raise LocalProtocolError(f"mencode has no dictionary keys of type {type(key).__name__}")
            yield key


class _Decoder:
    """Parses values. Every method takes the offset at which to begin, and returns the offset after it as well."""

    def __init__(self, data: bytes, limits: MencodeLimits) -> None:
        self._data = data
        self._limits = limits
        self._values_left = limits.values

    def value(self, at: int, depth: int) -> tuple[Value, int]:
        self._count(at)
        head = _KNOWN.match(self._data, at)
        if head is None:
            return self._unknown(at, depth)
        kind, start = head.lastindex, head.end()
        if kind == _NULL:
            return None, start
        if kind in (_LIST, _DICTIONARY):
            if depth >= self._limits.depth:
                raise MencodeError(f"mencode octet {at}: nested deeper than {self._limits.depth} levels")
            return self._list(start, depth) if kind == _LIST else self._dictionary(start, depth)
        atom, end = self._atom(start)
        if self._data[end : end + 1] != b")":
            raise MencodeError(f"mencode octet {end}: expected the closing parenthesis of a value")
        return (atom if kind == _STRING else self._integer(atom, start)), end + 1

    def _list(self, at: int, depth: int) -> tuple[Value, int]:
        items: list[Value] = []
        while not self._closes(at):
            item, at = self.value(at, depth + 1)
            items.append(item)
        return items, at + 1

    def _dictionary(self, at: int, depth: int) -> tuple[Value, int]:
        pairs: dict[Key, Value] = {}
        previous: Key | None = None
        while not self._closes(at):
            key, end = self.value(at, depth + 1)
            if not isinstance(key, int | bytes):
                raise MencodeError(f"mencode octet {at}: a dictionary key must be a string or an integer")
            if previous is not None and order(previous) >= order(key):
                raise MencodeError(f"mencode octet {at}: dictionary keys must be strictly ascending")
            previous = key
            value, at = self.value(end, depth + 1)
            if not isinstance(value, UnknownValue):
                pairs[key] = value
        return pairs, at + 1

    def _integer(self, decimal: bytes, at: int) -> int:
        if len(decimal.lstrip(b"-")) > self._limits.integer_digits:
            raise MencodeError(f"mencode octet {at}: integer has more than {self._limits.integer_digits} digits")
        if not _DECIMAL.fullmatch(decimal):
            raise MencodeError(f"mencode octet {at}: {_excerpt(decimal)} is not a canonical decimal number")
        return int(decimal)

    def _unknown(self, at: int, depth: int) -> tuple[UnknownValue, int]:
        """Skip a list that begins with an atom we do not know: atoms and lists up to its end."""
        if self._data[at : at + 1] != b"(":
            raise MencodeError(f"mencode octet {at}: expected the opening parenthesis of a value")
        type_name, end = self._atom(at + 1)
        if type_name in (b"null", b"string", b"int", b"list", b"dict"):
            raise MencodeError(f"mencode octet {end}: expected the closing parenthesis of a value")
        nested = 1
        while nested:
            self._count(end)
            if self._closes(end):
                nested -= 1
                end += 1
            elif self._data[end] == _OPEN:
                nested += 1
                end += 1
                if depth + nested > self._limits.depth:
                    raise MencodeError(f"mencode octet {end - 1}: nested deeper than {self._limits.depth} levels")
            else:
                end = self._atom(end)[1]
        return UnknownValue(type_name), end

    def _atom(self, at: int) -> tuple[bytes, int]:
        length = _ATOM.match(self._data, at)
        if length is None:
            raise MencodeError(f"mencode octet {at}: expected a length of 1 to {MAX_LENGTH_DIGITS} digits and a colon")
        start = length.end()
        end = start + int(length[1])
        if end > len(self._data):
            left = len(self._data) - start
            raise MencodeError(f"mencode octet {at}: {end - start} octets should follow, but only {left} do")
        return self._data[start:end], end

    def _closes(self, at: int) -> bool:
        if at >= len(self._data):
            raise MencodeError(f"mencode octet {at}: the data ends inside a value")
        return self._data[at] == _CLOSE

    def _count(self, at: int) -> None:
        self._values_left -= 1
        if self._values_left < 0:
            raise MencodeError(f"mencode octet {at}: more than {self._limits.values} values")


def _excerpt(octets: bytes) -> str:
    """At most 40 octets of the input, in a form that is safe to show."""
    return ascii(octets if len(octets) <= 40 else octets[:37] + b"...")[1:]
