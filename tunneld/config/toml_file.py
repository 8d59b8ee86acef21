"""TOML files: read, decoded and parsed, with the position of a mistake; and the files that their keys name."""

from __future__ import annotations

import codecs
import re
import tomllib
from pathlib import Path
from typing import Any

from tunneld.config.wording import literal
from tunneld.errors import reason_of

MAX_CONFIG_BYTES = 1024 * 1024
"""Largest configuration file in bytes. The annotated default has 6 KiB; a larger file is a wrong one, or a device."""

_POSITION = re.compile(r"(?P<what>.*) \(at (?:line (?P<line>\d+), column (?P<column>\d+)|end of document)\)", re.DOTALL)


def readable(path: Path) -> Path:
    """Return the path of a file that a key names. Raises `ValueError` if it cannot be read."""
    try:
        str(path).encode()  # --print-config must be able to write it
        with path.open("rb") as file:
            file.read(1)
    except OSError as error:
        raise ValueError(f"could not read {literal(path)}: {reason_of(error)}") from None
    except ValueError:
        raise ValueError(f"{literal(path)} is not a path: it contains a zero byte or is not UTF-8") from None
    return path


def toml(content: bytes) -> dict[str, Any]:
    """The tables in the content of a file. Raises `ValueError` with the position where it is not TOML."""
    return _toml(text_of(content))


def read_content(path: Path) -> bytes:
    """The content of a file. Raises `ValueError`."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise ValueError(f"could not read the configuration: {reason_of(error)}") from None
    if len(content) > MAX_CONFIG_BYTES:
        raise ValueError(f"could not read the configuration: larger than {MAX_CONFIG_BYTES} bytes")
    return content


def text_of(content: bytes) -> str:
    """The text of a file. Raises `ValueError` with the position where it is not UTF-8."""
    content = content.removeprefix(codecs.BOM_UTF8)  # some editors write it; TOML does not have it
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        before = content[: error.start].decode()
        position = _end_of(before)
        raise ValueError(f"{position}: byte 0x{content[error.start]:02x} is not UTF-8") from None


def _toml(text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("could not read the configuration: nested too deeply") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(_syntax_error(str(error), text)) from None
    except ValueError:  # int() limits its input, because its time is quadratic
        raise ValueError("could not read the configuration: an integer has thousands of digits") from None


def _syntax_error(message: str, text: str) -> str:
    """`Expected '=' ... (at line 3, column 5)` as `line 3, column 5: expected '=' ...`."""
    match = _POSITION.fullmatch(message)
    if match is None:
        return f"not TOML: {message[:1].lower()}{message[1:]}"
    what = match["what"][:1].lower() + match["what"][1:]
    position = f"line {match['line']}, column {match['column']}" if match["line"] else _end_of(text)
    return f"{position}: {what}"


def _end_of(text: str) -> str:
    line, column = text.count("\n") + 1, len(text) - text.rfind("\n")
    return f"line {line}, column {column}"
