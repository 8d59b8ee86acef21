"""From a file to `Settings`, or to every mistake in it at once; and from `Settings` to a file."""

from __future__ import annotations

import codecs
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import tomli_w
from pydantic import ValidationError

from tunneld.config.problems import sentences
from tunneld.config.schema import Settings
from tunneld.config.values import Loading, Table
from tunneld.errors import ConfigError, reason_of

AnyTable = TypeVar("AnyTable", bound=Table)

LARGEST = 1024 * 1024  # octets; the annotated default has 6 KiB, so this is a wrong file or a device without end
_PLACE = re.compile(r"(?P<what>.*) \(at (?:line (?P<line>\d+), column (?P<column>\d+)|end of document)\)", re.DOTALL)


def load(path: Path) -> Settings:
    """Read a configuration file.

    Relative paths in it start from its folder, and certificates are read to see that they fit.

    Raises:
        ConfigError: with one sentence for each mistake: file, key path or line, reason.
    """
    return load_as(Settings, path, parse)


def load_as(root: type[AnyTable], path: Path, parse: Callable[[bytes, Path], AnyTable]) -> AnyTable:
    """Read a file that is to be a `root`, as `parse` makes it of the content and the folder. Raises `ConfigError`."""
    try:
        return parse(_read(path), path.absolute().parent)
    except ValidationError as error:
        problems = sentences(error, root)
    except ValueError as error:
        problems = [str(error)]
    raise ConfigError([f"{path}: {problem}" for problem in problems])


def parse(content: bytes, folder: Path) -> Settings:
    """The settings in a file's content. Raises `pydantic.ValidationError`, or `ValueError` when it is not TOML."""
    tables = toml(content)
    return Settings.model_validate(tables, context=Loading(folder, credentials=bool(tables.get("credential"))))


def dump(settings: Settings) -> str:
    """All keys with their values, defaults included; what is not set (`[control.tls]`, `client_ca`) is left out.

    Of secrets it has what the file has: verifiers, and where the others are.
    """
    return tomli_w.dumps(settings.model_dump(mode="json", exclude_none=True))


def toml(content: bytes) -> dict[str, Any]:
    """The tables in a file's content. Raises `ValueError` that says where it is not TOML."""
    return _toml(_text(content))


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
    except OSError as error:
        raise ValueError(f"could not read the configuration: {reason_of(error)}") from None
    if len(content) > LARGEST:
        raise ValueError(f"could not read the configuration: larger than {LARGEST} octets")
    return content


def _text(content: bytes) -> str:
    content = content.removeprefix(codecs.BOM_UTF8)  # some editors put it there; TOML has no use for it
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        before = content[: error.start].decode()
        place = _end_of(before)
        raise ValueError(f"{place}: byte 0x{content[error.start]:02x} is not UTF-8") from None


def _toml(text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("not TOML that makes sense here: nested too deeply") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(_syntax_error(str(error), text)) from None
    except ValueError:  # the limit of int() against quadratic time
        raise ValueError("not TOML that makes sense here: an integer of thousands of digits") from None


def _syntax_error(message: str, text: str) -> str:
    """`Expected '=' ... (at line 3, column 5)` as `line 3, column 5: expected '=' ...`."""
    match = _PLACE.fullmatch(message)
    if match is None:
        return f"not TOML: {message[:1].lower()}{message[1:]}"
    what = match["what"][:1].lower() + match["what"][1:]
    place = f"line {match['line']}, column {match['column']}" if match["line"] else _end_of(text)
    return f"{place}: {what}"


def _end_of(text: str) -> str:
    line, column = text.count("\n") + 1, len(text) - text.rfind("\n")
    return f"line {line}, column {column}"
