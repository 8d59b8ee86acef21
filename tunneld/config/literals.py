"""Values as a person would write them in TOML, for messages: short, on one line, without control characters."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

LONGEST = 60  # characters of a string shown; enough to recognize it, short enough for one line of a terminal
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def literal(value: object) -> str:
    """`"text"`, `true`, `30.0`, `["a", "b"]`; what has no short form is named by its kind: `a table`."""
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            return quote(value)
        case Path():
            return _quoted(str(value))  # whole: its end is what tells one file from another
        case list() | tuple():
            return _array(value)
        case dict():
            return "a table"
        case None:
            return "nothing"
        case int() if abs(value) >= 10**LONGEST:
            return "a number of more than 60 digits"
        case _:
            return str(value)


def quote(text: str) -> str:
    """A string in double quotes, shortened, with everything that does not print escaped."""
    return _quoted(text if len(text) <= LONGEST else text[: LONGEST - 1] + "…")


def dotted(path: Sequence[str | int]) -> str:
    """A key path as TOML writes it: `control.tls.key`, `tunnels."a b"`, `http.allowed_hosts[0]`."""
    text = ""
    for part in path:
        match part:
            case int():
                text += f"[{part}]"
            case str():
                text += ("." if text else "") + (part if _BARE_KEY.fullmatch(part) else quote(part))
    return text


def _quoted(text: str) -> str:
    return '"' + "".join(_escape(character) for character in text) + '"'


def _array(value: Sequence[object]) -> str:
    if any(isinstance(item, dict) for item in value):
        return "an array of tables"
    whole = "[" + ", ".join(literal(item) for item in value[:LONGEST]) + "]"
    return whole if len(whole) <= LONGEST else "an array"


def _escape(character: str) -> str:
    if character in '"\\':
        return "\\" + character
    if character.isprintable():
        return character
    return f"\\u{ord(character):04x}" if ord(character) <= 0xFFFF else f"\\U{ord(character):08x}"
