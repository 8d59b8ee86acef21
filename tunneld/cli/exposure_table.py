"""The view of `tunnel up`: one line for each exposure, as a table.

    blog    connected since 14:03   3 visitors now   40 served   up 1.2 MiB (0 B/s)   down 20 MiB (0 B/s)
    files   reconnecting in 4 s: control connection to relay 192.0.2.1:7010 lost

Columns for which the terminal is too narrow are left out. If there are more exposures than the terminal has lines, the
last one says how many are hidden.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence

from tunneld.agent.events import Activity, Field, Stats
from tunneld.cli.exposure_state import ExposureState
from tunneld.cli.meter import RateMeter
from tunneld.cli.styled import GAP, PLAIN, RED, Line, Span, align, with_text
from tunneld.policy.units import count, format_size


class Row:
    """The line of one exposure."""

    def __init__(self, name: str, activity: Callable[[], Activity]) -> None:
        self.name = name
        self._activity = activity
        self._state = ExposureState()
        self._meter = RateMeter()

    def update(self, event: str, fields: Mapping[str, Field]) -> None:
        """Apply an event of the agent."""
        self._state.update(event, fields)

    def cells(self, now: float) -> tuple[list[Span], Span]:
        """The cells of the line at `now`, in `trio.current_time`, and a text after them that may be cut."""
        stats = self._activity().stats
        rates = self._meter.read(now, stats.up, stats.down)
        text, style = self._state.describe(now)
        if self._state.unhealthy:
            text, style = f"{text}, unhealthy", RED
        if not self._state.is_settled:
            return [(self.name, PLAIN)], (text, style)
        return [(self.name, PLAIN), (text, style), *((cell, PLAIN) for cell in traffic(stats, rates))], ("", PLAIN)


class ExposureTable:
    """The lines of all exposures."""

    def __init__(self) -> None:
        self._rows: dict[Row, None] = {}

    def add(self, name: str, activity: Callable[[], Activity]) -> Row:
        """Add a line for an exposure. A previous exposure of the same name keeps its own until it is removed."""
        row = Row(name, activity)
        self._rows[row] = None
        return row

    def remove(self, row: Row) -> None:
        """Remove the line of an exposure that has ended. Calling it again has no effect."""
        self._rows.pop(row, None)

    def label(self, name: str) -> str:
        """The name of an exposure, padded to the width of the longest one."""
        return name.ljust(max((len(row.name) for row in self._rows), default=0)) + GAP

    def lines(self, now: float, size: os.terminal_size) -> list[Line]:
        """See `View`."""
        rows = sorted(self._rows, key=lambda row: row.name)  # stable: a successor comes second
        return fitting([row.cells(now) for row in rows], size)


def fitting(rows: Sequence[tuple[list[Span], Span]], size: tuple[int, int]) -> list[Line]:
    """Format rows of `Row.cells` as a table that a terminal of (columns, lines) shows without wrapping or scrolling."""
    columns, height = size
    limit = max(1, height - 1)
    hidden: list[Line] = [[(f"and {len(rows) - limit + 1} more", PLAIN)]] if len(rows) > limit else []
    shown = rows[: limit - len(hidden)]
    lines = align([cells for cells, _ in shown], columns)
    return [*(with_text(line, text, columns) for line, (_, text) in zip(lines, shown, strict=True)), *hidden]


def traffic(stats: Stats, rates: tuple[int, int]) -> list[str]:
    """Cells such as `3 visitors now`, `40 served, 1 failed`, `up 1.2 MiB (3.0 KiB/s)`, `down 20 MiB (1.1 MiB/s)`,
    `8 connections ready`.

    Connections that are ready: those to the relay that can take a visitor, idle ones with the tcp backend, carriers
    with webmux.
    """
    failed = f", {stats.failed} failed" if stats.failed else ""
    up, down = rates
    return [
        f"{count(stats.now, 'visitor')} now",
        f"{stats.served} served{failed}",
        f"up {format_size(stats.up)} ({format_size(up)}/s)",
        f"down {format_size(stats.down)} ({format_size(down)}/s)",
        f"{count(stats.parked, 'connection')} ready",
    ]
