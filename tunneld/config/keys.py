"""Every key of the schema as a list: for diff, for "did you mean", for the test that reads tunnel.toml(5)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import get_args, get_origin

from pydantic.fields import FieldInfo

from tunneld.config.schema import Settings
from tunneld.config.values import RESTART, Table


@dataclass(frozen=True, slots=True)
class Key:
    """One key: its path (`tunnels.linger`), its field in the schema, whether a reload applies a change of it, and
    whether its table may be there many times (`credential.name`).
    """

    path: str
    field: FieldInfo
    live: bool
    repeated: bool = False


def keys(table: type[Table] = Settings, prefix: str = "", live: bool = True, repeated: bool = False) -> Iterator[Key]:
    """All keys of a table and of the tables in it, in schema order; `live` is what the table around says."""
    for name, field in table.model_fields.items():
        path, field_live = prefix + name, live and RESTART not in field.metadata
        if inner := subtable(field):
            yield from keys(inner, f"{path}.", field_live, repeated)
        elif inner := element(field):
            yield from keys(inner, f"{path}.", field_live, repeated=True)
        else:
            yield Key(path, field, field_live, repeated)


def tables(table: type[Table] = Settings, prefix: str = "") -> Iterator[tuple[str, type[Table]]]:
    """All tables with their paths: `("", Settings)`, `("control", Control)`, `("control.tls", Tls)`, ..."""
    yield prefix, table
    for name, field in table.model_fields.items():
        inner = subtable(field) or element(field)
        if inner is not None:
            yield from tables(inner, f"{prefix}.{name}".removeprefix("."))


def schema_path(path: Sequence[str | int], root: type[Table] = Settings) -> str:
    """The key path in the schema behind one in a file, which also has indices and the names of named tables:
    `expose.target` for `expose.blog.target`.
    """
    words: list[str] = []
    table, named = root, False
    for part in path:
        if named or isinstance(part, int):
            named = False
            continue
        words.append(part)
        field = table.model_fields.get(part)
        if field is not None:
            named = get_origin(field.annotation) is dict
            table = _table_in(field) or table
    return ".".join(words)


def subtable(field: FieldInfo) -> type[Table] | None:
    """The class of the table that a field holds, or None for a plain key and for an array."""
    return None if get_origin(field.annotation) is tuple else _table_in(field)


def element(field: FieldInfo) -> type[Table] | None:
    """The class of the tables in the array that a field holds, or None for any other field."""
    return _table_in(field) if get_origin(field.annotation) is tuple else None


def _table_in(field: FieldInfo) -> type[Table] | None:
    kinds = get_args(field.annotation) or (field.annotation,)
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Table)), None)
