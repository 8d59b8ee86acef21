"""Change one `[[credential]]` table in the text of a tunnel.toml, and nothing else in it. Pure.

    found       by its header, counted: the third header is the third table. Text that only looks like a header (in a
                string, say) makes the counts differ, or fails the proof below
    proved      the new text is read again: it must mean the old tables with exactly this change
    refused     where either fails, a file written in another style, say; a person can still do it by hand

Comments and blank lines outside the table stay, also those right above its header.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

import tomli_w

from tunneld.errors import UsageError

KEY = "credential"
_LINE = re.compile(r"[^\n]*\n|[^\n]+")
_OURS = re.compile(r"""\s*\[\[\s*(credential|"credential"|'credential')\s*\]\]\s*(#.*)?\s*""")
_HEADER = re.compile(r"\s*\[")
_VERIFIER = re.compile(r"""(?P<key>\s*verifier\s*=\s*)("[^"\\\n]*"|'[^'\n]*')(?P<rest>[^\n]*\n?)""")

Table = Mapping[str, Any]


def added(text: str, table: Table) -> str:
    """The text with one table more, at its end. Raises `UsageError` where the name is there."""
    tables = credentials(text)
    if any(one.get("name") == table["name"] for one in tables):
        raise UsageError(f"there is a credential {table['name']!r}; `rotate` gives it a new secret")
    gap = "" if not text else "\n" if text.endswith("\n") else "\n\n"
    spliced = f"{text}{gap}[[{KEY}]]\n{tomli_w.dumps(table)}"
    return _proved(text, spliced, [*tables, table])


def removed(text: str, name: str) -> str:
    """The text without the table of that name. Raises `UsageError` where there is none."""
    tables, index = credentials(text), _index(text, name)
    lines, start, end = _span(text, index)
    spliced = "".join(lines[:start] + lines[end:])
    return _proved(text, spliced, [*tables[:index], *tables[index + 1 :]])


def rotated(text: str, name: str, verifier: str) -> str:
    """The text with another verifier for that name. Raises `UsageError` where there is none to replace."""
    tables, index = credentials(text), _index(text, name)
    if "verifier" not in tables[index]:
        other = next((key for key in ("secret_file", "secret_env") if key in tables[index]), "certificate")
        raise UsageError(f"the credential {name!r} has no verifier, but a {other}: change what that names")
    lines, start, end = _span(text, index)
    found = [(at, match) for at in range(start, end) if (match := _VERIFIER.fullmatch(lines[at]))]
    if len(found) != 1:
        raise _unusual(f"the verifier of {name!r}")
    at, match = found[0]
    lines[at] = f'{match["key"]}"{verifier}"{match["rest"]}'
    new = {**tables[index], "verifier": verifier}
    return _proved(text, "".join(lines), [*tables[:index], new, *tables[index + 1 :]])


def credentials(text: str) -> list[dict[str, Any]]:
    """The tables as they are written. Raises `UsageError` where this is no TOML, or they are no tables."""
    found = _read(text).get(KEY, [])
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise _unusual("what is called credential")
    return found


def _index(text: str, name: str) -> int:
    found = [index for index, table in enumerate(credentials(text)) if table.get("name") == name]
    if len(found) != 1:
        raise UsageError(f"there is no credential {name!r}" if not found else f"there are several of the name {name!r}")
    return found[0]


def _span(text: str, index: int) -> tuple[list[str], int, int]:
    """All lines, and from which to which the table goes: its header, its keys, and comments right behind them."""
    lines = _LINE.findall(text)
    headers = [at for at, line in enumerate(lines) if _OURS.fullmatch(line)]
    if len(headers) != len(credentials(text)):
        raise _unusual("some credential")
    start = headers[index]
    end = next((at for at in range(start + 1, len(lines)) if _HEADER.match(lines[at])), len(lines))
    last = max(at for at in range(start, end) if lines[at].strip() and not lines[at].lstrip().startswith("#"))
    while last + 1 < end and lines[last + 1].strip():
        last += 1
    return lines, start, last + 1


def _proved(old: str, new: str, expected: Sequence[Table]) -> str:
    """The new text, if it means what the old one meant with these credentials."""
    before = {key: value for key, value in _read(old).items() if key != KEY}
    try:
        after = tomllib.loads(new)
    except tomllib.TOMLDecodeError:
        raise _unusual("some credential") from None
    if after.pop(KEY, []) != list(expected) or after != before:
        raise _unusual("some credential")
    return new


def _read(text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError):
        raise UsageError("it is not TOML; `tunneld --check` says more") from None


def _unusual(what: str) -> UsageError:
    return UsageError(f"{what} is not written as a table [[{KEY}]] with a key a line; change it by hand")
