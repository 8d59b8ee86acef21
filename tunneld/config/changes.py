"""What a reload changes: pure functions from two settings, so that the daemon only has to apply and to say it.

changes = diff(now, loaded)          what differs, key by key, and which of it is live
now = reloaded(now, loaded)          what holds from here on: live keys as loaded, the others as they were
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from tunneld.config.keys import keys, subtable
from tunneld.config.literals import literal
from tunneld.config.schema import RESTART, Settings, Table

AnyTable = TypeVar("AnyTable", bound=Table)


@dataclass(frozen=True, slots=True)
class Change:
    """One key whose value differs; None is a key that is not set. `live`: a reload applies it, without a restart."""

    key: str
    old: object
    new: object
    live: bool

    def __str__(self) -> str:
        suffix = "" if self.live else " (needs a restart)"
        return f"{self.key}: {literal(self.old)} -> {literal(self.new)}{suffix}"


def diff(old: Settings, new: Settings) -> list[Change]:
    """The keys that differ, in the order of the schema."""
    pairs = ((key, value(old, key.path), value(new, key.path)) for key in keys())
    return [Change(key.path, before, after, key.live) for key, before, after in pairs if before != after]


def reloaded(old: AnyTable, new: AnyTable) -> AnyTable:
    """The settings, or one table of them, after a reload: `new`, but `old` where only a restart applies a change."""
    held: dict[str, object] = {}
    for name, field in type(new).model_fields.items():
        before, after = getattr(old, name), getattr(new, name)
        if RESTART in field.metadata:
            held[name] = before
        elif subtable(field) is not None:
            held[name] = reloaded(before, after)
    return new.model_copy(update=held)


def value(settings: Settings, path: str) -> object:
    """The value of a key by its path, None where it or its table is not set."""
    found: object = settings
    for name in path.split("."):
        found = getattr(found, name, None)
    return found
