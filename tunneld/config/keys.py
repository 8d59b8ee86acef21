"""Every key of the schema as a list: for diff, for "did you mean", for the test that reads tunnel.toml(5)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

from pydantic.fields import FieldInfo

from tunneld.config.schema import RESTART, Settings, Table


@dataclass(frozen=True, slots=True)
class Key:
    """One key: its path (`tunnels.linger`), its field in the schema, and whether a reload applies a change of it."""

    path: str
    field: FieldInfo
    live: bool


def keys(table: type[Table] = Settings, prefix: str = "", live: bool = True) -> Iterator[Key]:
    """All keys of a table and of the tables in it, in schema order; `live` is what the table around says."""
    for name, field in table.model_fields.items():
        path, field_live = prefix + name, live and RESTART not in field.metadata
        inner = subtable(field)
        if inner is None:
            yield Key(path, field, field_live)
        else:
            yield from keys(inner, f"{path}.", field_live)


def tables(table: type[Table] = Settings, prefix: str = "") -> Iterator[tuple[str, type[Table]]]:
    """All tables with their paths: `("", Settings)`, `("control", Control)`, `("control.tls", Tls)`, ..."""
    yield prefix, table
    for name, field in table.model_fields.items():
        inner = subtable(field)
        if inner is not None:
            yield from tables(inner, f"{prefix}.{name}".removeprefix("."))


def subtable(field: FieldInfo) -> type[Table] | None:
    """The class of the table that a field holds, or None for a plain key."""
    kinds = get_args(field.annotation) or (field.annotation,)
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Table)), None)
