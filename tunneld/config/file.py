"""Loads a file as `Settings` and reports all of its errors at once; writes `Settings` as a file."""

from __future__ import annotations

import codecs
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError

from tunneld.config.keys import AnyTable
from tunneld.config.permissions import writable_by_all
from tunneld.config.ports import collisions
from tunneld.config.problems import sentences
from tunneld.config.salts import read_salt_key, state_folder_of
from tunneld.config.schema import Settings
from tunneld.config.values import Loading
from tunneld.errors import ConfigError, reason_of

MAX_CONFIG_BYTES = 1024 * 1024
"""Largest configuration file in bytes. The annotated default has 6 KiB; a larger file is a wrong one, or a device."""

_POSITION = re.compile(r"(?P<what>.*) \(at (?:line (?P<line>\d+), column (?P<column>\d+)|end of document)\)", re.DOTALL)


def load(path: Path) -> Settings:
    """Load a configuration file.

    Relative paths in it start from its folder. Certificates and keys are read to check them.

    Raises:
        ConfigError: with one sentence per error: file, key path or line, reason. Files that every user of the machine
            can change are errors, too.
    """
    settings = load_as(Settings, path, parse)
    if problems := writable_by_all(settings, path):
        raise ConfigError([f"{path}: {problem}" for problem in problems])
    return settings


def load_as(root: type[AnyTable], path: Path, parse: Callable[[bytes, Path], AnyTable]) -> AnyTable:
    """Load a file as a `root`; `parse` gets its content and its folder. Raises `ConfigError`."""
    try:
        return parse(_read(path), path.absolute().parent)
    except ValidationError as error:
        problems = sentences(error, root)
    except ConfigError as error:
        problems = list(error.problems)
    except ValueError as error:
        problems = [str(error)]
    raise ConfigError([f"{path}: {problem}" for problem in problems])


def parse(content: bytes, folder: Path) -> Settings:
    """The settings in the content of a file. Raises `pydantic.ValidationError`, `ValueError` if it is not TOML, or
    `ConfigError` if two keys ask for the same port.
    """
    tables = toml(content)
    salt_key = read_salt_key(state_folder_of(tables, folder))
    context = Loading(folder, bool(tables.get("credential")), salt_key)
    settings = Settings.model_validate(tables, context=context)
    if problems := list(collisions(settings, _text(content))):
        raise ConfigError(problems)
    return settings


def dump(settings: Settings) -> str:
    """All keys with their values, defaults included; keys that are not set (`[control.tls]`, `client_ca`) are omitted.

    As in the file, secrets are represented by their verifiers or by the places where they are kept.
    """
    return tomli_w.dumps(settings.model_dump(mode="json", exclude_none=True))


def toml(content: bytes) -> dict[str, Any]:
    """The tables in the content of a file. Raises `ValueError` with the position where it is not TOML."""
    return _toml(_text(content))


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise ValueError(f"could not read the configuration: {reason_of(error)}") from None
    if len(content) > MAX_CONFIG_BYTES:
        raise ValueError(f"could not read the configuration: larger than {MAX_CONFIG_BYTES} bytes")
    return content


def _text(content: bytes) -> str:
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
