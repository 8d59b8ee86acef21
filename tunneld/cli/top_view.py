"""The screen of `tunnel top`: tunnels, or the visitors of one, sorted and filtered; and what its keys do.

    tunnel top   2 tunnels   41 visitors   up 3.0 KiB/s   down 21 MiB/s   relay.example.org:7010
    filter: blog
    id   name    address                       visitors        up/s     down/s ▼
    t4   blog    https://blog.t.example.org           40   3.0 KiB/s      20 MiB/s
    t7   shell   tcp://192.0.2.1:20001                 1       0 B/s     1.1 MiB/s

    q quit   enter visitors   / filter   ←→ sort   r reverse   ↑↓ choose

The view knows neither the relay nor the terminal: it gets records and keys.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from tunneld.cli.meter import Meters
from tunneld.cli.styled import BOLD, DIM, PLAIN, RED, REVERSE, YELLOW, Line, Span, align, join, width
from tunneld.cli.tables import Record
from tunneld.cli.top_rows import TUNNELS, VISITORS, Row, TopColumn, format_rate, matching, number, ordered, with_rates
from tunneld.policy.units import count

COLUMN_GAP = "  "
"""Between two columns, of which there are many."""
TUNNEL_HINTS = ("q quit", "enter visitors", "/ filter", "←→ sort", "r reverse", "↑↓ choose")
VISITOR_HINTS = ("q quit", "escape tunnels", "k kick", "/ filter", "←→ sort", "r reverse", "↑↓ choose")
MIN_TABLE = 2
"""Lines of the table in a terminal that is too low: the heading and the chosen row."""
PAGE = 10
"""Rows for page up and page down."""


class Listing:
    """One of the two tables: its rows, their order, and the chosen one."""

    def __init__(self, columns: Sequence[TopColumn], key: str, sort: str) -> None:
        self.columns = columns
        self.key = key
        self.rows: list[Row] = []
        self.filter = ""
        self.chosen = ""  # the value of `key` of the chosen row
        self.reverse = False
        self._sort = next((index for index, column in enumerate(columns) if column.key == sort), 0)
        self._meters = Meters()

    def visible(self) -> list[TopColumn]:
        """The columns that tell something, and that by which the rows are sorted."""
        return [one for one in self.columns if one is self.sort or not one.is_empty(self.rows)]

    @property
    def sort(self) -> TopColumn:
        """The column by which the rows are sorted."""
        return self.columns[self._sort]

    def update(self, now: float, records: Sequence[Record]) -> None:
        """Take what the relay sent."""
        self.rows = with_rates(self._meters, now, records, self.key)

    def shown(self) -> list[Row]:
        """The rows that pass the filter, in order; one of them is the chosen one."""
        rows = ordered(matching(self.rows, self.filter), self.sort, reverse=self.reverse)
        if rows and all(row.get(self.key, "") != self.chosen for row in rows):
            self.chosen = rows[0].get(self.key, "")
        return rows

    def sort_by(self, step: int) -> None:
        """Sort by the next column to the right or left."""
        visible = self.visible()
        self._sort = self.columns.index(visible[(visible.index(self.sort) + step) % len(visible)])

    def choose(self, step: int) -> None:
        """Choose the row some lines below."""
        keys = [row.get(self.key, "") for row in self.shown()]
        if keys:
            self.chosen = keys[max(0, min(len(keys) - 1, keys.index(self.chosen) + step))]


class TopView:
    """Everything on the screen."""

    def __init__(self, relay: str, on_kick: Callable[[str, str], object], *, sort: str) -> None:
        """`relay` is its address; `on_kick` is called with a tunnel and a visitor once the user has confirmed."""
        self.ended = False
        """Whether the user wants to quit."""
        self.tunnel = ""
        """The id of the tunnel whose visitors are shown; "" for all tunnels."""
        self.problem = ""
        """Why there are no newer figures."""
        self.message = ""
        """What came of the last kick."""
        self._relay = relay
        self._on_kick = on_kick
        self._sort = sort
        self._tunnels = Listing(TUNNELS, "id", sort)
        self._visitors = Listing(VISITORS, "visitor", sort)
        self._title: Row = {}  # of the tunnel whose visitors are shown
        self._typing = False  # the filter is being typed
        self._asked: tuple[str, str] | None = None  # a tunnel and a visitor, until the user has confirmed

    @property
    def listing(self) -> Listing:
        """The table that is shown."""
        return self._visitors if self.tunnel else self._tunnels

    def update(self, now: float, records: Sequence[Record]) -> None:
        """Take the answer of the relay to `list`, or to `show` if there is a tunnel."""
        self.problem = ""
        if self.tunnel:
            self._title, records = (records[0], records[1:]) if records else ({}, [])
        self.listing.update(now, records)

    def gone(self) -> None:
        """The tunnel whose visitors are shown is closed: show all tunnels again."""
        self.message, self.tunnel = f"tunnel {self.tunnel} is closed", ""

    # Keys

    def press(self, key: str) -> None:
        """A key was pressed."""
        if self._asked is not None:
            self._answer(key)
        elif self._typing:
            self._type(key)
        else:
            self._command(key)

    def _answer(self, key: str) -> None:
        asked, self._asked = self._asked, None
        if key == "y" and asked is not None:
            self._on_kick(*asked)
        else:
            self.message = ""

    def _type(self, key: str) -> None:
        if key in {"enter", "escape"}:
            self._typing = False
            self.listing.filter = self.listing.filter if key == "enter" else ""
        elif key == "backspace":
            self.listing.filter = self.listing.filter[:-1]
        elif len(key) == 1 and key.isprintable():
            self.listing.filter += key

    def _command(self, key: str) -> None:
        listing = self.listing
        steps = {"up": -1, "down": 1, "page up": -PAGE, "page down": PAGE}
        if key in steps:
            listing.choose(steps[key])
        elif key in {"left", "right"}:
            listing.sort_by(1 if key == "right" else -1)
        elif key == "r":
            listing.reverse = not listing.reverse
        elif key == "/":
            self._typing = True
        elif key == "enter" and not self.tunnel and listing.shown():
            self.tunnel, self._title = listing.chosen, {}
            self._visitors = Listing(VISITORS, "visitor", self._sort)
        elif key in {"escape", "backspace"}:
            listing.filter, self.tunnel = "", ""
        elif key == "k":
            self._ask_kick()
        elif key == "q":
            self.ended = True

    def _ask_kick(self) -> None:
        if not self.tunnel:
            self.message = "to disconnect a visitor, choose its tunnel with enter first"
        elif self.listing.shown():
            self._asked = self.tunnel, self.listing.chosen
            self.message = ""

    # Lines

    def lines(self, now: float, size: os.terminal_size) -> list[Line]:
        """See `View`."""
        columns, height = size
        hints = VISITOR_HINTS if self.tunnel else TUNNEL_HINTS
        top = [join(self._summary(), columns), self._prompt()]
        foot = [join([(hint, DIM) for hint in hints], columns)]
        body = self._table(columns, max(MIN_TABLE, height - len(top) - len(foot)))
        blank: list[Line] = [[("", PLAIN)]] * (max(MIN_TABLE, height - len(top) - len(foot)) - len(body))
        return [*top, *body, *blank, *foot]

    def _summary(self) -> list[Span]:
        rows = self.listing.rows
        up, down = (sum(number(row, key) for row in rows) for key in ("up_rate", "down_rate"))
        rates = [(f"up {format_rate(up)}", PLAIN), (f"down {format_rate(down)}", PLAIN)]
        if self.tunnel:
            names = dict.fromkeys([self.tunnel, self._title.get("name", self.tunnel)])
            what = [(" ".join(names), BOLD), (count(len(rows), "visitor"), PLAIN)]
        else:
            visitors = sum(number(row, "visitors") for row in rows)
            what = [(count(len(rows), "tunnel"), PLAIN), (count(visitors, "visitor"), PLAIN)]
        where = [(self._title["client"], PLAIN)] if self.tunnel and self._title.get("client") else []
        return [("tunnel top", BOLD), *what, *rates, *where, (self._relay, DIM)]

    def _prompt(self) -> Line:
        """The second line: a question, the filter, or what went wrong."""
        if self._asked is not None:
            tunnel, visitor = self._asked
            question = f"disconnect {visitor}? y/n   "
            return [(question, YELLOW), (f"tunnel kick {tunnel} {visitor}", DIM)]
        if self._typing or self.listing.filter:
            return [(f"filter: {self.listing.filter}{'_' if self._typing else ''}", PLAIN)]
        return [(self.problem, RED)] if self.problem else [(self.message, YELLOW)]

    def _table(self, columns: int, room: int) -> list[Line]:
        """The heading and as many rows as there is room for, among them the chosen one."""
        listing, rows = self.listing, self.listing.shown()
        if not rows:
            nothing = "nothing passes the filter" if listing.rows else f"no {'visitors' if self.tunnel else 'tunnels'}"
            return [[(nothing, DIM)]]
        chosen = next(index for index, row in enumerate(rows) if row.get(listing.key, "") == listing.chosen)
        first = max(0, min(chosen - room // 2, len(rows) - room + 1))
        seen = rows[first : first + max(1, room - 1)]
        visible = listing.visible()
        cells = [[(f"{column.title}{self._mark(column)}", BOLD) for column in visible]]
        cells += [[(column.text(row), PLAIN) for column in visible] for row in seen]
        lines = align(
            cells,
            columns,
            frozenset(index for index, column in enumerate(visible) if column.shown is not None),
            gap=COLUMN_GAP,
            ranks=[column.rank for column in visible],
        )
        return [_chosen(line, columns) if index == chosen - first + 1 else line for index, line in enumerate(lines)]

    def _mark(self, column: TopColumn) -> str:
        """The mark of the column by which the rows are sorted."""
        if column is not self.listing.sort:
            return ""
        largest_first = (column.shown is not None) is not self.listing.reverse
        return " ▼" if largest_first else " ▲"


def _chosen(line: Line, columns: int) -> Line:
    """A line in reverse video, over the full width."""
    text = "".join(text for text, _ in line)
    return [(text + " " * max(0, columns - width(line)), REVERSE)]
