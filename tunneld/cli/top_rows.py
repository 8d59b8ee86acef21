"""The rows of `tunnel top`: tunnels and visitors with their rates, and the columns by which they are sorted. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from tunneld.cli.meter import Meters
from tunneld.cli.tables import Record
from tunneld.policy.units import format_duration, format_size
from tunneld.wire.records import is_count

RATES = ("up_rate", "down_rate")
"""The keys that the rows have besides those of the relay's records, in bytes per second."""
EMPTY_AT_ZERO = frozenset({"refused"})
"""Columns of numbers that are only shown where one of them is not 0."""
Row = Mapping[str, str]
"""A record of the relay, with its rates."""


@dataclass(frozen=True, slots=True)
class TopColumn:
    """A column: its key, its title, how a number is shown (None: it is a text), and how soon it is left out where the
    terminal is narrow: the highest first.
    """

    key: str
    title: str
    shown: Callable[[int], str] | None = None
    rank: int = 0

    def text(self, row: Row) -> str:
        """The cell of a row."""
        value = row.get(self.key, "")
        if self.shown is None:
            return value or "-"
        return self.shown(int(value)) if is_count(value) else "-"

    def is_empty(self, rows: Sequence[Row]) -> bool:
        """Whether the column tells nothing about any of the rows."""
        if self.shown is None:
            return not any(row.get(self.key) for row in rows)
        return self.key in EMPTY_AT_ZERO and not any(number(row, self.key) for row in rows)

    def order(self, row: Row) -> tuple[int, str]:
        """What rows are sorted by: large numbers first, and texts by the alphabet."""
        value = row.get(self.key, "")
        return (0, value) if self.shown is None else (-number(row, self.key), "")


def format_rate(rate: int) -> str:
    """`1.2 MiB/s`."""
    return f"{format_size(rate)}/s"


TRAFFIC = (
    TopColumn("up_rate", "up/s", format_rate),
    TopColumn("down_rate", "down/s", format_rate),
    TopColumn("up", "up", format_size, 5),
    TopColumn("down", "down", format_size, 5),
    TopColumn("age", "age", format_duration, 4),
)
TUNNELS = (
    TopColumn("id", "id"),
    TopColumn("name", "name", rank=1),
    TopColumn("client", "address", rank=2),
    TopColumn("owner", "owner", rank=6),
    TopColumn("phase", "phase", rank=7),
    TopColumn("visitors", "visitors", str),
    TopColumn("refused", "refused", str, 3),
    *TRAFFIC,
)
VISITORS = (
    TopColumn("visitor", "visitor"),
    TopColumn("host", "host", rank=1),
    TopColumn("credential", "credential", rank=2),
    *TRAFFIC,
)
DEFAULT_SORT = "down_rate"
SORTS = tuple(column.key for column in TUNNELS)
"""The keys of `--sort`."""


def number(row: Row, key: str) -> int:
    """A count in a row; 0 where the relay sent none."""
    value = row.get(key, "")
    return int(value) if is_count(value) else 0


def with_rates(meters: Meters, now: float, records: Sequence[Record], key: str) -> list[Row]:
    """The records with their rates since the former ones; `key` is the name of what tells one from another."""
    rates = meters.read(
        now, records, lambda record: record.get(key, ""), lambda record: (number(record, "up"), number(record, "down"))
    )
    return [
        {**record, **dict(zip(RATES, map(str, rate), strict=True))} for record, rate in zip(records, rates, strict=True)
    ]


def ordered(rows: Sequence[Row], column: TopColumn, *, reverse: bool = False) -> list[Row]:
    """The rows in the order of a column; equal ones stay as the relay sent them."""
    return sorted(rows, key=column.order, reverse=reverse)


def matching(rows: Sequence[Row], words: str) -> list[Row]:
    """The rows that contain each of the words, in any of their texts."""
    return list(filter(partial(_contains, words.lower().split()), rows))


def _contains(words: Sequence[str], row: Row) -> bool:
    text = " ".join(row.values()).lower()
    return all(word in text for word in words)
