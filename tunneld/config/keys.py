"""Every key of the schema as a list, and the difference of two configurations. Pure.

The list serves `diff`, the hint "did you mean", and the test of tunnel.toml(5). A reload is two calls, after which the
daemon has only to apply and log the changes:

    changes = diff(now, loaded)          the keys that differ, and whether a reload applies them
    now = reloaded(now, loaded)          the settings in force: live keys as loaded, all other keys unchanged
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar, get_args, get_origin

from pydantic.fields import FieldInfo

from tunneld.config.schema import Settings
from tunneld.config.values import RESTART, Table
from tunneld.config.wording import literal


@dataclass(frozen=True, slots=True)
class Key:
    """One key: its path (`tunnels.linger`), its field in the schema, whether a reload applies it (`live`), and whether
    its table may occur more than once (`credential.name`).
    """

    path: str
    field: FieldInfo
    live: bool
    repeated: bool = False


def keys(table: type[Table] = Settings, prefix: str = "", live: bool = True, repeated: bool = False) -> Iterator[Key]:
    """All keys of a table and its subtables, in schema order. `prefix`, `live` and `repeated` describe the table."""
    for name, field in table.model_fields.items():
        path, field_live = prefix + name, live and RESTART not in field.metadata
        if inner := subtable(field):
            yield from keys(inner, f"{path}.", field_live, repeated)
        elif inner := array_table(field):
            yield from keys(inner, f"{path}.", field_live, repeated=True)
        else:
            yield Key(path, field, field_live, repeated)


def tables(table: type[Table] = Settings, prefix: str = "") -> Iterator[tuple[str, type[Table]]]:
    """All tables with their paths: `("", Settings)`, `("control", Control)`, `("control.tls", Tls)`, ..."""
    yield prefix, table
    for name, field in table.model_fields.items():
        inner = subtable(field) or array_table(field)
        if inner is not None:
            yield from tables(inner, f"{prefix}.{name}".removeprefix("."))


def schema_path(path: Sequence[str | int], root: type[Table] = Settings) -> str:
    """The key path in the schema for one in a file, which also has indices and the names of named tables:
    `expose.target` for `expose.blog.target`.
    """
    names: list[str] = []
    table, named = root, False
    for part in path:
        if named or isinstance(part, int):
            named = False
            continue
        names.append(part)
        field = table.model_fields.get(part)
        if field is not None:
            named = get_origin(field.annotation) is dict
            table = _table_in(field) or table
    return ".".join(names)


def subtable(field: FieldInfo) -> type[Table] | None:
    """The class of the table that a field holds, or None for a plain key and for an array."""
    return None if get_origin(field.annotation) is tuple else _table_in(field)


def array_table(field: FieldInfo) -> type[Table] | None:
    """The class of the tables in the array that a field holds, or None for any other field."""
    return _table_in(field) if get_origin(field.annotation) is tuple else None


def _table_in(field: FieldInfo) -> type[Table] | None:
    kinds = get_args(field.annotation) or (field.annotation,)
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Table)), None)


OF_TUNNELS = frozenset(
    {
        *("host", "advertised_host", "ports", "max_visitors", "max_parked", "parked_check", "max_waiting"),
        *("pairing_timeout", "open_timeout", "linger", "keepalive", "max_per_source", "visitor_rate", "bandwidth"),
        *("quota", "max_sources", "trusted_proxies", "proxy_header_timeout"),
    }
)
"""Keys of [tunnels] that a tunnel has for its life. A reload applies the other ones to open tunnels, too."""
OF_GRANTS = frozenset({"backends", "ports", "names", "server_from", "max_visitors", "max_ttl", "bandwidth", "quota"})
"""The same of a credential."""

AnyTable = TypeVar("AnyTable", bound=Table)


@dataclass(frozen=True, slots=True)
class Change:
    """One key with a different value; None is a key that is not set. `live`: a reload applies it."""

    key: str
    old: object
    new: object
    live: bool

    @property
    def applies(self) -> str:
        """When it applies: `now`, `to new tunnels` or `after a restart`."""
        if not self.live:
            return "after a restart"
        table, _, name = self.key.rpartition(".")
        per_tunnel = name in OF_GRANTS if table.startswith("credential.") else name in OF_TUNNELS
        return "to new tunnels" if per_tunnel and table.startswith(("credential.", "tunnels")) else "now"

    def __str__(self) -> str:
        suffix = {"now": "", "to new tunnels": " (for tunnels opened from now on)"}.get(
            self.applies, " (needs a restart)"
        )
        return f"{self.key}: {literal(self.old)} -> {literal(self.new)}{suffix}"


def diff(old: Settings, new: Settings) -> list[Change]:
    """The keys that differ, in schema order; then certificates for host names, each by its file, and credentials, each
    by its name.
    """
    pairs = ((key, value(old, key.path), value(new, key.path)) for key in keys() if not key.repeated)
    changes = [Change(key.path, before, after, key.live) for key, before, after in pairs if before != after]
    return [*changes, *_certificate_changes(old, new), *_credential_changes(old, new)]


def _certificate_changes(old: Settings, new: Settings) -> Iterator[Change]:
    """One change for each certificate for host names that is added, removed or has another key."""
    before, after = ({each.certificate: each.key for each in settings.certificate} for settings in (old, new))
    for path in {**before, **after}:
        if before.get(path) != after.get(path):
            yield Change(f"certificate.{path}", before.get(path), after.get(path), live=True)


def _credential_changes(old: Settings, new: Settings) -> Iterator[Change]:
    """One change for a credential that is added or removed, else one for each of its keys. Secrets are not shown."""
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
            changes = [Change(f"{path}.secret", "old", "new", live=True)]  # the content of its file has changed
        yield from changes


def reloaded(old: AnyTable, new: AnyTable) -> AnyTable:
    """The settings, or one table of them, after a reload: `new`, but `old` for keys that need a restart."""
    held: dict[str, object] = {}
    for name, field in type(new).model_fields.items():
        before, after = getattr(old, name), getattr(new, name)
        if RESTART in field.metadata:
            held[name] = before
        elif isinstance(before, Table) and isinstance(after, Table):
            held[name] = reloaded(before, after)
    return new.model_copy(update=held)


def value(settings: Settings, path: str) -> object:
    """The value of a key by its path; None if the key or its table is not set."""
    found: object = settings
    for name in path.split("."):
        found = getattr(found, name, None)
    return found
