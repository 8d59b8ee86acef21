"""Records of the control protocol as text: tables for people, tab-separated fields for awk, JSON lines for jq. Pure."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

Record = Mapping[str, str]

PROCESS = frozenset({"descriptors", "max_descriptors", "pid", "penalised", "strangers", "strangers_refused", "uptime"})
TRAFFIC = frozenset(
    {
        "bandwidth",
        "down",
        "max_per_source",
        "max_visitors",
        "parked",
        "quota",
        "refused",
        "served",
        "up",
        "visitors",
        "waiting",
    }
)
PORTS = frozenset({"client_port", "server_port"})
NUMBERS = PROCESS | TRAFFIC | PORTS | {"age", "count", "left", "opened", "reservations", "tunnels"}
"""Keys whose values are whole numbers."""
ANSWERS = {"yes": True, "no": False}
YES_OR_NO = frozenset({"persist", "needs_restart"})

KIB = 1024
UNITS = ("KiB", "MiB", "GiB", "TiB", "PiB")


class Form(Enum):
    """What the text is for."""

    PEOPLE = "people"
    FIELDS = "fields"
    JSON = "json"


def octets(text: str | int) -> str:
    """`512 B`, `1.5 KiB`, `12 MiB`: three digits say enough."""
    if not str(text).isdigit():
        return str(text)
    number, unit = float(text), "B"
    for larger in UNITS:
        if number < KIB - 0.5:
            break
        number, unit = number / KIB, larger
    return f"{number:.1f} {unit}" if unit != "B" and number < 9.95 else f"{number:.0f} {unit}"


def seconds(text: str | int) -> str:
    """`12s`, `3m05s`, `2h10m`, `5d03h`."""
    if not str(text).isdigit():
        return str(text)
    total = int(text)
    minutes, hours, days = total // 60, total // 3600, total // 86400
    if days:
        return f"{days}d{hours % 24:02}h"
    if hours:
        return f"{hours}h{minutes % 60:02}m"
    return f"{minutes}m{total % 60:02}s" if minutes else f"{total}s"


SHAPES: Mapping[str, Callable[[str], str]] = {
    "up": octets,
    "down": octets,
    "age": seconds,
    "uptime": seconds,
    "left": seconds,
}
"""How people read the values of some keys."""


@dataclass(frozen=True, slots=True)
class TableColumn:
    """A key of the records and whether its values are counted, hence aligned on the right."""

    key: str
    right: bool = False


TUNNELS = (
    *(TableColumn(key) for key in ("id", "name", "backend", "phase", "client", "server", "owner")),
    *(TableColumn(key, right=True) for key in ("visitors", "waiting", "parked", "served", "up", "down", "age")),
)
VISITORS = (TableColumn("visitor"), TableColumn("up", right=True), TableColumn("down", right=True))
RESERVATIONS = (
    *(TableColumn(key) for key in ("name", "owner", "backend")),
    *(TableColumn(key, right=True) for key in ("client_port", "server_port")),
    TableColumn("tunnel"),
    TableColumn("left", right=True),
)
SETTINGS = tuple(TableColumn(key) for key in ("key", "value"))
CHANGES = tuple(TableColumn(key) for key in ("key", "old", "new", "needs_restart"))


def table(records: Sequence[Record], columns: Sequence[TableColumn], form: Form) -> str:
    """All records under headings, or as `form` wants them; ends in a line end unless it is empty."""
    if form is Form.JSON:
        return json_lines(records)
    if form is Form.FIELDS:
        return "".join(_fields(printable(record.get(column.key, "")) for column in columns) for record in records)
    rows = [[column.key.upper().replace("_", " ") for column in columns]]
    rows += [[shaped(column.key, record.get(column.key, "")) or "-" for column in columns] for record in records]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    return "".join(_aligned(row, widths, columns) for row in rows)


def facts(record: Record, form: Form) -> str:
    """One record, a line for each key."""
    if form is Form.JSON:
        return json_lines([record])
    if form is Form.FIELDS:
        return "".join(_fields((key, printable(value))) for key, value in record.items())
    width = max(map(len, record), default=0)
    return "".join(f"{key.replace('_', ' '):{width}}  {shaped(key, value)}\n" for key, value in record.items())


def json_lines(records: Iterable[Mapping[str, object]]) -> str:
    """One JSON object a line; what counts is a number, what is yes or no is a boolean."""
    objects = ({key: _typed(key, value) for key, value in record.items()} for record in records)
    return "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in objects)


def shaped(key: str, value: str) -> str:
    """A value as people read it."""
    return SHAPES.get(key, str)(printable(value))


def printable(text: str) -> str:
    """What a stranger chose (a name), made safe for terminals and tables: controls are escaped."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _typed(key: str, value: object) -> object:
    if key in NUMBERS and isinstance(value, str) and value.isdigit():
        return int(value)
    if key in YES_OR_NO and isinstance(value, str):
        return ANSWERS.get(value, value)
    return value


def _fields(values: Iterable[str]) -> str:
    return "\t".join(values) + "\n"


def _aligned(row: Sequence[str], widths: Sequence[int], columns: Sequence[TableColumn]) -> str:
    cells = (
        f"{cell:>{width}}" if column.right else f"{cell:<{width}}"
        for cell, width, column in zip(row, widths, columns, strict=True)
    )
    return "  ".join(cells).rstrip() + "\n"
