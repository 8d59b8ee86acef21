"""The file expose.toml: a relay and several exposures, checked against the tables of keys.py. tunnel(1) describes every
key.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunneld.agent.config import ExposureConfig, plan_of
from tunneld.agent.keys import KEYS, RELAY_KEYS
from tunneld.agent.kinds import KeyPlace
from tunneld.config.toml_file import read_content, toml
from tunneld.config.wording import literal, unrecognized
from tunneld.errors import ConfigError, UsageError

TABLES = ("relay", "expose")
_PATHS = {
    **{key: f"relay.{key}" for key in RELAY_KEYS},
    **{key: f"expose.{key}" for key in KEYS if key not in RELAY_KEYS},
    **dict(zip(TABLES, TABLES, strict=True)),
}
"""The paths of all keys by name, for hints."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # what openTunnel takes as a name


@dataclass(frozen=True, slots=True)
class ExposeFile:
    """A whole expose.toml."""

    relay: Mapping[str, Any]
    """The keys of `[relay]` that are set. Missing ones come from the environment, like missing options of a command."""
    plans: Mapping[str, ExposureConfig]
    """The configurations of the exposures, by name."""


def load_plans(path: Path) -> ExposeFile:
    """Read expose.toml. Relative paths in it start from its folder. Raises `ConfigError`, one sentence per mistake."""
    problems: list[str] = []
    try:
        tables = toml(read_content(path))
    except ValueError as error:
        raise ConfigError([f"{path}: {error}"]) from None
    top = KeyPlace(path.absolute().parent, (), problems)
    relay = _table(tables.get("relay", {}), top.below("relay"), _read_relay) or {}
    plans = _table(tables.get("expose", {}), top.below("expose"), _read_exposures) or {}
    _refuse_unknown(tables, TABLES, top)
    if problems:
        raise ConfigError([f"{path}: {problem}" for problem in problems])
    return ExposeFile(relay, plans)


def _table(
    value: object, place: KeyPlace, read: Callable[[Mapping[str, object], KeyPlace], Mapping[str, Any]]
) -> Mapping[str, Any] | None:
    """Read a table with `read`; None after a mistake."""
    if isinstance(value, dict):
        return read(value, place)
    place.fail(f"{literal(value)} is not a table")
    return None


def _read_relay(table: Mapping[str, object], place: KeyPlace) -> Mapping[str, Any]:
    found = {key: place.below(key).read(RELAY_KEYS[key], table[key]) for key in RELAY_KEYS if key in table}
    _refuse_unknown(table, RELAY_KEYS, place)
    return found


def _read_exposures(table: Mapping[str, object], place: KeyPlace) -> Mapping[str, ExposureConfig]:
    plans: dict[str, ExposureConfig] = {}
    for name, value in table.items():
        values = _table(value, place.below(name), _read_exposure)
        if not _NAME.fullmatch(name):
            place.fail(f"{literal(name)} is not a name of at most 64 letters, digits, dots, dashes and underscores")
        elif values:
            try:
                plans[name] = plan_of({**values, "name": values["name"] or name}, str)
            except UsageError as error:
                place.below(name).fail(str(error))
    if not table:
        place.fail("there is nothing to expose: add a table [expose.NAME] with a target")
    return plans


def _read_exposure(table: Mapping[str, object], place: KeyPlace) -> Mapping[str, Any]:
    """The values of all keys; empty after a mistake."""
    mistakes = len(place.problems)
    values = {key: row.default for key, row in KEYS.items()}
    if "target" not in table:
        place.below("target").fail("missing, and it has no default")
    values |= {key: place.below(key).read(row.kind, table[key]) for key, row in KEYS.items() if key in table}
    _refuse_unknown(table, KEYS, place)
    return values if len(place.problems) == mistakes else {}


def _refuse_unknown(table: Mapping[str, object], known: Collection[str], place: KeyPlace) -> None:
    for name, value in table.items():
        if name not in known:
            kind = "table" if isinstance(value, dict) else "key"
            place.below(name).fail(unrecognized(name, kind, ".".join(map(str, place.path)), list(known), _PATHS))
