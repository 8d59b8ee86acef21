"""Output of the agent: status lines at the bottom of a terminal, and a writer that never blocks.

`Board` keeps one status line for each exposure, as a table:

    blog    connected since 14:03   3 visitors now   40 served   up 1.2 MiB (0 B/s)   down 20 MiB (0 B/s)
    files   reconnecting in 4 s: control connection to relay 192.0.2.1:7010 lost

A single exposure has no name. Columns for which the terminal is too narrow are left out. If there are more exposures
than the terminal has lines, the last one says how many are hidden.

`Writer` writes lines to a terminal, a pipe or a file. A terminal can be stopped (Ctrl-S) and a pipe can be full, and a
direct write would then block the agent, which could not serve its visitors. So lines go through a bounded queue, and a
thread writes them, many at a time.
"""

from __future__ import annotations

import math
import os
import select
import shutil
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from itertools import zip_longest

import trio

from tunneld.agent.events import Field, Stats
from tunneld.cli.common import OutputError, OutputGoneError, printable, printable_lines
from tunneld.errors import reason_of
from tunneld.policy.units import count, format_size

REDRAW_INTERVAL = 0.5
"""Seconds between two updates of the status lines."""
CLEAR_LINE = "\r\x1b[K"
"""Moves the cursor to the first column and erases the line."""
CURSOR_UP = "\x1b[A"
SEPARATOR = "   "
"""Between two cells."""


class Row:
    """The state of one exposure, as far as its status line shows it. `LiveReporter` feeds it with events."""

    def __init__(self, name: str, stats: Callable[[], Stats]) -> None:
        self.name = name
        self._stats = stats
        self._previous = stats()
        self._since = ""  # local time at which the agent connected; "" while it is not connected
        self._retry_at = 0.0  # in `trio.current_time`
        self._reason = ""  # why it is not connected
        self._unhealthy = False  # the local server is
        self._stop_at: float | None = None  # in `trio.current_time`; not None while stopping

    def update(self, event: str, fields: Mapping[str, Field]) -> None:
        """Apply an event of the agent."""
        match event:
            case "opened" | "resumed":
                self._since = datetime.now().astimezone().strftime("%H:%M")
            case "reconnecting":
                self._since, self._reason = "", str(fields["reason"])
                self._retry_at = trio.current_time() + float(fields["delay"])
            case "draining":
                self._stop_at = trio.current_time() + float(fields.get("delay", math.inf))
            case "unhealthy":
                self._unhealthy = True
            case "healthy":
                self._unhealthy = False

    def cells(self, now: float) -> tuple[list[str], str]:
        """The cells of the status line at `now`, in `trio.current_time`, and a text after them that may be cut. Call it
        once per `REDRAW_INTERVAL`.
        """
        stats, previous = self._stats(), self._previous
        self._previous = stats
        name = [self.name] if self.name else []
        if self._stop_at is not None:
            limit = "" if math.isinf(self._stop_at) else f", disconnecting in {max(0, round(self._stop_at - now))} s"
            return [*name, f"stopping{limit}", *traffic(stats, previous, REDRAW_INTERVAL)], ""
        unhealthy = ", unhealthy" if self._unhealthy else ""
        if self._since:
            state = f"connected since {self._since}{unhealthy}"
            return [*name, state, *traffic(stats, previous, REDRAW_INTERVAL)], ""
        if not self._reason:
            return name, f"connecting{unhealthy}"
        wait = round(self._retry_at - now)
        return name, f"reconnecting {f'in {wait} s' if wait > 0 else 'now'}: {self._reason}{unhealthy}"


class Board:
    """The status lines of all exposures, and the lines printed above them."""

    def __init__(self, err: Writer) -> None:
        self.err = err
        self._rows: dict[Row, None] = {}
        self._drawn: list[str] = []
        self._used = trio.Event()  # a row was added

    def add(self, name: str, stats: Callable[[], Stats]) -> Row:
        """Add a line for an exposure. A previous exposure of the same name keeps its own until it is removed."""
        row = Row(name, stats)
        self._rows[row] = None
        self._used.set()
        return row

    def remove(self, row: Row) -> None:
        """Remove the line of an exposure that has ended. Calling it again has no effect."""
        self._rows.pop(row, None)

    def label(self, name: str) -> str:
        """The name of an exposure, padded to the width of the longest one."""
        return name.ljust(max((len(row.name) for row in self._rows), default=0)) + SEPARATOR

    def notice(self, line: str) -> None:
        """Print a permanent line above the status lines."""
        self._draw([], f"{line}\n")

    async def run(self) -> None:
        """Redraw the status lines until cancelled, then erase them."""
        await self._used.wait()
        try:
            while True:
                rows = sorted(self._rows, key=lambda row: row.name)  # stable: a successor comes second
                lines = fitting([row.cells(trio.current_time()) for row in rows], shutil.get_terminal_size())
                if lines != self._drawn:
                    self._draw(lines)
                await trio.sleep(REDRAW_INTERVAL)
        finally:
            self._draw([])

    def _draw(self, lines: list[str], above: str = "") -> None:
        erase = CLEAR_LINE + (CURSOR_UP + CLEAR_LINE) * (len(self._drawn) - 1) if self._drawn else ""
        self.err.draw(erase + printable_lines(above) + "\n".join(map(printable, lines)))
        self._drawn = lines


def fitting(rows: Sequence[tuple[list[str], str]], size: tuple[int, int]) -> list[str]:
    """Format rows of `Row.cells` as a table that a terminal of (columns, lines) shows without wrapping or scrolling."""
    columns, height = size
    limit = max(1, height - 1)
    hidden = [f"and {len(rows) - limit + 1} more"] if len(rows) > limit else []
    shown = [([printable(cell) for cell in cells], printable(text)) for cells, text in rows[: limit - len(hidden)]]
    widths = [max(map(len, column)) for column in zip_longest(*(cells for cells, _ in shown), fillvalue="")]
    while len(widths) > 1 and sum(widths) + len(SEPARATOR) * (len(widths) - 1) >= columns:
        widths.pop()  # the least important column, whole
    return [*(_fitted(cells, text, widths, columns - 1) for cells, text in shown), *hidden]


def _fitted(cells: list[str], text: str, widths: list[int], room: int) -> str:
    padded = [cell.ljust(width) for cell, width in zip(cells, widths, strict=False)]
    line = SEPARATOR.join([*padded, *([text] if text else [])]).rstrip()
    return line if len(line) <= room else line[: max(0, room - 1)] + "…"


def traffic(now: Stats, before: Stats, interval: float) -> list[str]:
    """Cells such as `3 visitors now`, `40 served, 1 failed`, `up 1.2 MiB (3.0 KiB/s)`, `down 20 MiB (1.1 MiB/s)`,
    `8 connections ready`.

    The rates are those between two statistics taken `interval` seconds apart. Connections that are ready: those to the
    relay that can take a visitor, idle ones with the tcp backend, carriers with webmux.
    """
    failed = f", {now.failed} failed" if now.failed else ""
    up, down = (int(max(0, new - old) / interval) for new, old in ((now.up, before.up), (now.down, before.down)))
    return [
        f"{count(now.now, 'visitor')} now",
        f"{now.served} served{failed}",
        f"up {format_size(now.up)} ({format_size(up)}/s)",
        f"down {format_size(now.down)} ({format_size(down)}/s)",
        f"{count(now.parked, 'connection')} ready",
    ]


MAX_QUEUED_LINES = 10_000
"""Lines kept for a slow reader, a few megabytes. Beyond that, the oldest are dropped."""
WRITE_PAUSE = 0.02
"""Seconds between two writes. Under load a thousand lines leave together, and the delay is not noticeable."""
FINAL_WRITE_TIMEOUT = 1.0
"""Seconds for the last lines to be written when the agent ends."""


class Writer:
    """A queue of lines for one descriptor, written by a thread."""

    def __init__(
        self, descriptor: int, *, vital: bool, on_failure: Callable[[str], None] = lambda _reason: None
    ) -> None:
        """`vital`: without a reader the program is useless, so a failed write raises from `open`; else lines are
        dropped. `on_failure` gets the reason for the first ones dropped.
        """
        self._descriptor = descriptor
        self._vital = vital
        self._on_failure = on_failure
        self._failed = False
        self._lines: deque[str] = deque(maxlen=MAX_QUEUED_LINES)
        self._has_lines = trio.Event()
        self._closing = False
        self._scope = trio.CancelScope(shield=True)  # an error that ends the block does not end the writing

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Writer]:
        """Write during the block. Lines put before its end are still written, within `FINAL_WRITE_TIMEOUT`.

        Raises `OutputError` in a group if the descriptor is vital and cannot be written to.
        """
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._run)
            try:
                yield self
            finally:
                self._closing = True
                self._has_lines.set()
                self._scope.deadline = trio.current_time() + FINAL_WRITE_TIMEOUT

    @property
    def is_terminal(self) -> bool:
        """Whether the descriptor is a terminal."""
        return os.isatty(self._descriptor)

    @property
    def queued(self) -> int:
        """How many texts wait to be written."""
        return len(self._lines)

    def put(self, text: str) -> None:
        """Queue lines to be written soon, see `printable`. Never blocks, never raises."""
        self.draw(printable_lines(text))

    def draw(self, text: str) -> None:
        """Do the same for text with control sequences of our own."""
        self._lines.append(text)
        self._has_lines.set()

    async def _run(self) -> None:
        with self._scope:
            while not (self._closing and not self._lines):
                await self._has_lines.wait()
                self._has_lines = trio.Event() if not self._closing else self._has_lines
                await self._write_queued()
                await trio.sleep(0 if self._closing else WRITE_PAUSE)

    async def _write_queued(self) -> None:
        text = "".join(self._lines)
        self._lines.clear()
        try:
            await trio.to_thread.run_sync(self._write, text.encode(errors="replace"), abandon_on_cancel=True)
        except OSError as error:
            reason = f"could not write to standard output: {reason_of(error)}"
            if self._vital:
                raise (OutputGoneError if isinstance(error, BrokenPipeError) else OutputError)(reason) from None
            if not self._failed:
                self._failed = True
                self._on_failure(reason)

    def _write(self, data: bytes) -> None:
        """Write all of `data`, in a thread. The descriptor may be non-blocking: another process can have set that."""
        while data:
            try:
                data = data[os.write(self._descriptor, data) :]
            except BlockingIOError:
                select.select([], [self._descriptor], [])
