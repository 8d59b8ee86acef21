"""Change one `[[credential]]` table in the text of a tunnel.toml, and nothing else. Pure.

A table is found by counting headers: the third header belongs to the third table. Text that only looks like a header,
inside a string for example, makes the counts differ or fails the verification.

The new text is parsed again, and must contain the old tables with exactly this change. If a table cannot be found or
the verification fails, because the file is written in another style, the change is refused and has to be made by hand.

Comments and blank lines outside the table are kept, including those directly above its header.
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
_CREDENTIAL_HEADER = re.compile(r"""\s*\[\[\s*(credential|"credential"|'credential')\s*\]\]\s*(#.*)?\s*""")
_HEADER = re.compile(r"\s*\[")
_VERIFIER = re.compile(r"""(?P<key>\s*verifier\s*=\s*)("[^"\\\n]*"|'[^'\n]*')(?P<rest>[^\n]*\n?)""")

Table = Mapping[str, Any]


def added(text: str, table: Table) -> str:
    """Append a table. Raises `UsageError` if there is a credential of the same name."""
    tables = credentials(text)
    if any(one.get("name") == table["name"] for one in tables):
        raise UsageError(f"credential {table['name']!r} already exists; to replace its secret, use `rotate`")
    gap = "" if not text else "\n" if text.endswith("\n") else "\n\n"
    new = f"{text}{gap}[[{KEY}]]\n{tomli_w.dumps(table)}"
    return _verified(text, new, [*tables, table])


def removed(text: str, name: str) -> str:
    """Remove the table of a credential. Raises `UsageError` if there is none."""
    tables, index = credentials(text), _index(text, name)
    lines, start, end = _span(text, index)
    new = "".join(lines[:start] + lines[end:])
    return _verified(text, new, [*tables[:index], *tables[index + 1 :]])


def rotated(text: str, name: str, verifier: str) -> str:
    """Replace the verifier of a credential. Raises `UsageError` if it has none."""
    tables, index = credentials(text), _index(text, name)
    if "verifier" not in tables[index]:
        other = next((key for key in ("secret_file", "secret_env") if key in tables[index]), "certificate")
        raise UsageError(f"credential {name!r} has no verifier but a {other}; change its content instead")
    lines, start, end = _span(text, index)
    found = [(at, match) for at in range(start, end) if (match := _VERIFIER.fullmatch(lines[at]))]
    if len(found) != 1:
        raise _unusual(f"the verifier of {name!r}")
    at, match = found[0]
    lines[at] = f'{match["key"]}"{verifier}"{match["rest"]}'
    new = {**tables[index], "verifier": verifier}
    return _verified(text, "".join(lines), [*tables[:index], new, *tables[index + 1 :]])


def changed(text: str, name: str, keys: Table) -> str:
    """Set keys of a credential; None removes one. Raises `UsageError` if there is no such credential or key."""
    tables, index = credentials(text), _index(text, name)
    new, edited = dict(tables[index]), text
    for key, value in keys.items():
        if value is None and key not in new:
            raise UsageError(f"credential {name!r} has no {key}")
        new[key] = value
        edited = _with_key(edited, index, key, value)
    kept = {key: value for key, value in new.items() if value is not None}
    return _verified(text, edited, [*tables[:index], kept, *tables[index + 1 :]])


def _with_key(text: str, index: int, key: str, value: object) -> str:
    """The text with another value of a key, in place of the old one or at the end of the table; None: without it."""
    lines, start, end = _span(text, index)
    found = re.compile(rf"\s*{key}\s*=")
    first = next((at for at in range(start, end) if found.match(lines[at])), end)
    after = next((at for at in range(first + 1, end + 1) if _is_toml("".join(lines[first:at]))), first)
    if first == end:
        lines[end - 1] = lines[end - 1].removesuffix("\n") + "\n"  # the last line of a file may lack its end
    lines[first:after] = [] if value is None else [tomli_w.dumps({key: value})]
    return "".join(lines)


def _is_toml(text: str) -> bool:
    try:
        tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return False
    return True


def credentials(text: str) -> list[dict[str, Any]]:
    """Parse the tables. Raises `UsageError` if the text is not TOML, or `credential` is not an array of tables."""
    found = _read(text).get(KEY, [])
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise _unusual("`credential`")
    return found


def _index(text: str, name: str) -> int:
    found = [index for index, table in enumerate(credentials(text)) if table.get("name") == name]
    if len(found) != 1:
        raise UsageError(f"no credential {name!r}" if not found else f"more than one credential {name!r}")
    return found[0]


def _span(text: str, index: int) -> tuple[list[str], int, int]:
    """Return all lines, and the first and the end of those of a table: its header, keys, and comments after them."""
    lines = _LINE.findall(text)
    headers = [at for at, line in enumerate(lines) if _CREDENTIAL_HEADER.fullmatch(line)]
    if len(headers) != len(credentials(text)):
        raise _unusual("a credential")
    start = headers[index]
    end = next((at for at in range(start + 1, len(lines)) if _HEADER.match(lines[at])), len(lines))
    last = max(at for at in range(start, end) if lines[at].strip() and not lines[at].lstrip().startswith("#"))
    while last + 1 < end and lines[last + 1].strip():
        last += 1
    return lines, start, last + 1


def _verified(old: str, new: str, expected: Sequence[Table]) -> str:
    """Return the new text if it means the same as the old one, but with these credentials. Raises `UsageError`."""
    before = {key: value for key, value in _read(old).items() if key != KEY}
    try:
        after = tomllib.loads(new)
    except tomllib.TOMLDecodeError:
        raise _unusual("a credential") from None
    if after.pop(KEY, []) != list(expected) or after != before:
        raise _unusual("a credential")
    return new


def _read(text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError):
        raise UsageError("it is not valid TOML; run `tunneld --check` for details") from None


def _unusual(what: str) -> UsageError:
    return UsageError(f"{what} is not written as a table [[{KEY}]] with one key per line; edit the file by hand")
