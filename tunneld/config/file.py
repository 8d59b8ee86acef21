"""Loads a file as `Settings` and reports all of its errors at once; writes `Settings` as a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import tomli_w
from pydantic import ValidationError

from tunneld.config.keys import AnyTable
from tunneld.config.permissions import writable_by_all
from tunneld.config.ports import collisions
from tunneld.config.problems import sentences
from tunneld.config.salts import read_salt_key, state_folder_of
from tunneld.config.schema import Settings
from tunneld.config.toml_file import read_content, text_of, toml
from tunneld.config.values import Loading
from tunneld.errors import ConfigError


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
        return parse(read_content(path), path.absolute().parent)
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
    if problems := list(collisions(settings, text_of(content))):
        raise ConfigError(problems)
    return settings


def dump(settings: Settings) -> str:
    """All keys with their values, defaults included; keys that are not set (`[control.tls]`, `client_ca`) are omitted.

    As in the file, secrets are represented by their verifiers or by the places where they are kept.
    """
    return tomli_w.dumps(settings.model_dump(mode="json", exclude_none=True))
