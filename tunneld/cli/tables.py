"""Format records of the control protocol: tables for people, tab-separated fields for awk, JSON lines for jq. Pure."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from tunneld.cli.common import printable
from tunneld.policy.units import format_duration, format_size
from tunneld.wire.records import is_count, typed

Record = Mapping[str, str]


class Form(Enum):
    """The format of the output: for a terminal, for a pipe, or as asked for by `--json`."""

    PEOPLE = "people"
    FIELDS = "fields"
    JSON = "json"


FORMATTERS: Mapping[str, Callable[[int], str]] = {
    "up": format_size,
    "down": format_size,
    "age": format_duration,
    "uptime": format_duration,
    "left": format_duration,
    "expires": format_duration,
    "renews": format_duration,
}
"""How integers of these keys are shown to people."""


@dataclass(frozen=True, slots=True)
class TableColumn:
    """A key of the records, and whether its values are aligned on the right, as numbers are."""

    key: str
    right: bool = False


TUNNELS = (
    *(TableColumn(key) for key in ("id", "name", "backend", "phase", "client", "server", "owner")),
    *(TableColumn(key, right=True) for key in ("visitors", "waiting", "parked", "served", "up", "down", "age")),
)
"""All columns of `list`."""
COUNTS = ("waiting", "refused")
"""Columns of the short table that are left out where there are no such visitors."""
MIN_OWNERS = 2
"""Owners from which on the short table has a column for them."""
SHORT = (
    *(TableColumn(key) for key in ("id", "name", "client", "owner", "phase")),
    *(TableColumn(key, right=True) for key in ("visitors", "waiting", "refused", "up", "down", "age")),
)
VISITORS = (
    TableColumn("visitor"),
    *(TableColumn(key, right=True) for key in ("up", "down", "age")),
    *(TableColumn(key) for key in ("host", "credential")),
)
OF_SOME_VISITORS = ("host", "credential")
"""Columns that are left out for people where no visitor has such a fact."""
GAP = "  "
"""Between two columns."""
SPARE = ("up", "down", "age", "owner", "phase")
"""Columns of the short table that a narrow terminal does without, the first of them first; `tunnel show` has them."""
RESERVATIONS = (
    *(TableColumn(key) for key in ("name", "owner", "backend", "address")),
    TableColumn("server_port", right=True),
    TableColumn("tunnel"),
    TableColumn("left", right=True),
)
PENALTIES = (
    *(TableColumn(key) for key in ("address", "scope", "credential")),
    *(TableColumn(key, right=True) for key in ("failures", "left")),
)
BANS = (TableColumn("network"), TableColumn("left", right=True))
CERTIFICATES = (
    *(TableColumn(key) for key in ("names", "source")),
    *(TableColumn(key, right=True) for key in ("expires", "renews")),
    *(TableColumn(key) for key in ("owner", "failure")),
)
SETTINGS = tuple(TableColumn(key) for key in ("key", "value"))
CHANGES = tuple(TableColumn(key) for key in ("key", "old", "new", "needs_restart", "applies"))
SHORT_CHANGES = tuple(TableColumn(key) for key in ("key", "old", "new", "applies"))


def short_columns(records: Sequence[Record], width: int) -> Sequence[TableColumn]:
    """The columns of `list` for people: without keys, without columns that tell nothing, and without some `SPARE` ones
    where a line would have more than `width` characters.
    """
    owners = {record.get("owner", "").partition("@")[0] for record in records}
    empty = {key for key in COUNTS if all(record.get(key, "0") == "0" for record in records)}
    if len(owners) < MIN_OWNERS:
        empty.add("owner")
    columns = [column for column in SHORT if column.key not in empty]
    for spare in SPARE:
        if sum(_widths(_rows(records, columns))) + len(GAP) * (len(columns) - 1) <= width:
            break
        columns = [column for column in columns if column.key != spare]
    return columns


def advertised(records: Sequence[Record]) -> Sequence[Record]:
    """The records of tunnels, with the address that a browser needs where that is known."""
    return [{**record, "client": record["url"]} if "url" in record else record for record in records]


def visitor_columns(records: Sequence[Record]) -> Sequence[TableColumn]:
    """The columns for visitors, for people: without columns that tell nothing."""
    present = {key for record in records for key in record}
    return [column for column in VISITORS if column.key in present or column.key not in OF_SOME_VISITORS]


def table(records: Sequence[Record], columns: Sequence[TableColumn], form: Form) -> str:
    """Format records, for people under headings. The text ends in a newline unless it is empty."""
    if form is Form.JSON:
        return json_lines(records)
    if form is Form.FIELDS:
        return "".join(_fields(printable(record.get(column.key, "")) for column in columns) for record in records)
    rows = _rows(records, columns)
    widths = _widths(rows)
    return "".join(_aligned(row, widths, columns) for row in rows)


def _rows(records: Sequence[Record], columns: Sequence[TableColumn]) -> Sequence[Sequence[str]]:
    """The cells of a table for people, headings first."""
    rows = [[column.key.upper().replace("_", " ") for column in columns]]
    return rows + [[for_people(one.key, record.get(one.key, "")) or "-" for one in columns] for record in records]


def _widths(rows: Sequence[Sequence[str]]) -> Sequence[int]:
    return [max(map(len, cells)) for cells in zip(*rows, strict=True)]


def facts(record: Record, form: Form) -> str:
    """Format one record with a line for each key."""
    if form is Form.JSON:
        return json_lines([record])
    if form is Form.FIELDS:
        return "".join(_fields((key, printable(value))) for key, value in record.items())
    width = max(map(len, record), default=0)
    return "".join(f"{key.replace('_', ' '):{width}}  {for_people(key, value)}\n" for key, value in record.items())


def json_lines(records: Iterable[Mapping[str, object]]) -> str:
    """Format one JSON object per line, with integers and booleans for the keys that have such values."""
    return "".join(json_line({key: _typed(key, value) for key, value in record.items()}) for record in records)


def json_line(record: Mapping[str, object]) -> str:
    """Format one JSON object with a line end. Characters that do not print are escaped, as JSON allows for all."""
    text = json.dumps(record, ensure_ascii=False)
    return "".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in text) + "\n"


def for_people(key: str, value: str) -> str:
    """Format the value of a key for people."""
    if key == "expires" and value.startswith("-"):
        return "expired"
    return FORMATTERS[key](int(value)) if key in FORMATTERS and is_count(value) else printable(value)


def _typed(key: str, value: object) -> object:
    return typed(key, value) if isinstance(value, str) else value


def _fields(values: Iterable[str]) -> str:
    return "\t".join(values) + "\n"


def _aligned(row: Sequence[str], widths: Sequence[int], columns: Sequence[TableColumn]) -> str:
    cells = (
        f"{cell:>{width}}" if column.right else f"{cell:<{width}}"
        for cell, width, column in zip(row, widths, columns, strict=True)
    )
    return GAP.join(cells).rstrip() + "\n"
