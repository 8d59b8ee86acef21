"""Values, key paths and unknown keys as messages about a TOML file have them. Pure.

`literal` and its helpers write a value as TOML does: short, on one line, without control characters.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path

MAX_SHOWN = 60
"""Characters of a value in a message: enough to recognize it, short enough for one line of a terminal."""

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def literal(value: object) -> str:
    """`"text"`, `true`, `30.0`, `["a", "b"]`; a value without a short form is named by its type: `a table`."""
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            return quote(value)
        case Path():
            return _quoted(str(value))  # not shortened: the end of a path distinguishes it
        case list() | tuple():
            return _array(value)
        case dict():
            return "a table"
        case None:
            return "nothing"
        case int() if abs(value) >= 10**MAX_SHOWN:
            return "a number of more than 60 digits"
        case _:
            return str(value)


def quote(text: str) -> str:
    """A string in double quotes, shortened, with non-printing characters escaped."""
    return _quoted(text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 1] + "…")


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
    whole = "[" + ", ".join(literal(item) for item in value[:MAX_SHOWN]) + "]"
    return whole if len(whole) <= MAX_SHOWN else "an array"


def _escape(character: str) -> str:
    if character in '"\\':
        return "\\" + character
    if character.isprintable():
        return character
    return f"\\u{ord(character):04x}" if ord(character) <= 0xFFFF else f"\\U{ord(character):08x}"


def unrecognized(name: str, kind: str, table: str, own_keys: Sequence[str], other_keys: Mapping[str, str]) -> str:
    """The error for an unknown key, with a hint: a very similar key of its `table` or of another one, else a similar
    key of its table, else all keys of that. `kind` is key or table; `other_keys` are the paths of all keys by name.
    """
    if near := get_close_matches(name, own_keys, n=1, cutoff=0.8):
        hint = f"did you mean {near[0]}?"
    elif far := get_close_matches(name, other_keys, n=1, cutoff=0.8):
        hint = f"did you mean {other_keys[far[0]]}?"
    elif near := get_close_matches(name, own_keys, n=1):
        hint = f"did you mean {near[0]}?"
    else:
        hint = f"{f'[{table}]' if table else 'the file'} accepts {', '.join(own_keys)}"
    return f"unrecognized {kind}; {hint}"
