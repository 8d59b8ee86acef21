"""What a reload changes: pure functions from two settings, so that the daemon only has to apply and to say it.

changes = diff(now, loaded)          what differs, key by key, and which of it is live
now = reloaded(now, loaded)          what holds from here on: live keys as loaded, the others as they were
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

from tunneld.config.keys import keys
from tunneld.config.literals import literal
from tunneld.config.schema import Settings
from tunneld.config.values import RESTART, Table

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
    """The keys that differ, in the order of the schema, credentials last and each by its name."""
    pairs = ((key, value(old, key.path), value(new, key.path)) for key in keys() if not key.repeated)
    changes = [Change(key.path, before, after, key.live) for key, before, after in pairs if before != after]
    return [*changes, *_of_credentials(old, new)]


def _of_credentials(old: Settings, new: Settings) -> Iterator[Change]:
    """One change for a credential that comes or goes, else one for each of its keys. Secrets are not shown."""
    before = {credential.name: credential for credential in old.credential}
    after = {credential.name: credential for credential in new.credential}
    for name in {**before, **after}:
        path, was, now = f"credential.{name}", before.get(name), after.get(name)
        if was is None or now is None:
            yield Change(path, None if was is None else was.role, None if now is None else now.role, live=True)
            continue
        pairs = [(key, getattr(was, key), getattr(now, key)) for key in type(now).model_fields]
        changes = [Change(f"{path}.{key}", one, other, live=True) for key, one, other in pairs if one != other]
        if was.proof != now.proof and not changes:
            changes = [Change(f"{path}.secret", "as it was", "another one", live=True)]  # its file has changed
        yield from changes


def reloaded(old: AnyTable, new: AnyTable) -> AnyTable:
    """The settings, or one table of them, after a reload: `new`, but `old` where only a restart applies a change."""
    held: dict[str, object] = {}
    for name, field in type(new).model_fields.items():
        before, after = getattr(old, name), getattr(new, name)
        if RESTART in field.metadata:
            held[name] = before
        elif isinstance(before, Table) and isinstance(after, Table):
            held[name] = reloaded(before, after)
    return new.model_copy(update=held)


def value(settings: Settings, path: str) -> object:
    """The value of a key by its path, None where it or its table is not set."""
    found: object = settings
    for name in path.split("."):
        found = getattr(found, name, None)
    return found
