"""Typed access to the dictionaries of decoded messages. Pure.

Every function raises `RemoteProtocolError` that names the key: `EGTP message: 'nonce' must be 20 octets`. Unknown keys
are ignored, since the protocol was extended by adding keys.
"""

from __future__ import annotations

from tunneld.errors import RemoteProtocolError
from tunneld.wire.egtp.ids import read_id
from tunneld.wire.mencode import Key, Value

Dictionary = dict[Key, Value]


def as_dictionary(value: Value, what: str) -> Dictionary:
    """The value, if it is a dictionary; `what` names it in the error."""
    if not isinstance(value, dict):
        raise RemoteProtocolError(f"EGTP message: {what} must be a dictionary")
    return value


def dictionary_at(fields: Dictionary, key: bytes) -> Dictionary:
    """The dictionary at a key."""
    return as_dictionary(fields.get(key), _name(key))


def octets_at(fields: Dictionary, key: bytes, length: int | None = None) -> bytes:
    """The octet string at a key, of this length if given."""
    value = fields.get(key)
    if not isinstance(value, bytes) or length not in (None, len(value)):
        size = "an octet string" if length is None else f"{length} octets"
        raise RemoteProtocolError(f"EGTP message: {_name(key)} must be {size}")
    return value


def integer_at(fields: Dictionary, key: bytes, lowest: int, default: int | None = None) -> int:
    """The integer at a key, at least `lowest`; `default` if the key is missing."""
    value = fields.get(key, default)
    if not isinstance(value, int) or (value < lowest and value != default):
        raise RemoteProtocolError(f"EGTP message: {_name(key)} must be an integer of at least {lowest}")
    return value


def id_at(fields: Dictionary, key: bytes) -> bytes:
    """The id at a key, in either form."""
    try:
        return read_id(fields.get(key))
    except RemoteProtocolError as problem:
        raise RemoteProtocolError(f"EGTP message: {_name(key)} is {problem}") from None


def list_at(fields: Dictionary, key: bytes, limit: int) -> list[Value]:
    """The list at a key, of at most `limit` items."""
    value = fields.get(key)
    if not isinstance(value, list) or len(value) > limit:
        raise RemoteProtocolError(f"EGTP message: {_name(key)} must be a list of at most {limit} items")
    return value


def _name(key: bytes) -> str:
    return f"'{key.decode()}'"
