"""Live lines at the bottom of a terminal: one for each exposure, each in plain words.

    connected since 14:03   3 visitors now, 40 served   up 1.2 MiB (3.0 KiB/s)   down 20 MiB (1.1 MiB/s)   8 parked
    reconnecting in 4 s: control connection to relay 192.0.2.1:7010 lost

Where there are several, each begins with its name; where there are more than the terminal has lines, the last line says
how many are not shown.

Lines for a terminal, a pipe or a file, without ever waiting for them.

A terminal can be stopped (Ctrl-S) and a pipe can be full; whoever writes to them then waits, and an agent that waits
serves nobody. So lines go through a bounded store, and a thread writes them, many at a time.
"""

from __future__ import annotations

import math
import os
import select
import shutil
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import datetime

import trio

from tunneld.agent.events import Field, Stats
from tunneld.cli.common import OutputError, OutputGoneError
from tunneld.cli.tables import octets, printable
from tunneld.errors import reason_of

REDRAW = 0.5
"""Seconds between two looks at the figures."""
CLEAR = "\r\x1b[K"
"""To the first column, and erase the line."""
UP = "\x1b[A"
"""To the line above."""


class Row:
    """What an exposure is doing, as its events tell."""

    def __init__(self, name: str, figures: Callable[[], Stats]) -> None:
        self.name = name
        self._figures = figures
        self._before = figures()
        self._since = ""  # when the relay was reached, as a clock shows it; "": it is not
        self._retry_at = 0.0  # in `trio.current_time`
        self._reason = ""  # why it is not
        self._unhealthy = ""  # why the local server is
        self._cut_at: float | None = None  # in `trio.current_time`, once it is told to end

    def update(self, event: str, fields: Mapping[str, Field]) -> None:
        """An event changes what is said."""
        match event:
            case "opened" | "resumed":
                self._since = datetime.now().astimezone().strftime("%H:%M")
            case "reconnecting":
                self._since, self._reason = "", str(fields["reason"])
                self._retry_at = trio.current_time() + float(fields["delay"])
            case "draining":
                self._cut_at = trio.current_time() + float(fields.get("delay", math.inf))
            case "unhealthy":
                self._unhealthy = f"   unhealthy: {fields['reason']}"
            case "healthy":
                self._unhealthy = ""

    def line(self, now: float) -> str:
        """The line at `now`, in `trio.current_time`."""
        figures, before = self._figures(), self._before
        self._before = figures
        if self._cut_at is not None:
            cut = "" if math.isinf(self._cut_at) else f", visitors are cut in {max(0, round(self._cut_at - now))} s"
            return f"ending{cut}   {traffic(figures, before, REDRAW)}"
        if self._since:
            return f"connected since {self._since}{self._unhealthy}   {traffic(figures, before, REDRAW)}"
        if not self._reason:
            return f"connecting{self._unhealthy}"
        wait = round(self._retry_at - now)
        return f"reconnecting {f'in {wait} s' if wait > 0 else 'now'}: {self._reason}{self._unhealthy}"


class Board:
    """The lines of all exposures, and what is printed above them."""

    def __init__(self, err: Writer) -> None:
        self.err = err
        self._rows: dict[Row, None] = {}
        self._drawn: list[str] = []

    def add(self, name: str, figures: Callable[[], Stats]) -> Row:
        """One more exposure. A former one of that name has a row until it ends."""
        row = Row(name, figures)
        self._rows[row] = None
        return row

    def remove(self, row: Row) -> None:
        """That one ended. Harmless when repeated."""
        self._rows.pop(row, None)

    def notice(self, line: str) -> None:
        """Print a line that stays, above the others."""
        self._draw([], f"{line}\n")

    async def run(self) -> None:
        """Redraw until cancelled, then leave the cursor on a line of its own."""
        try:
            while True:
                rows = sorted(self._rows, key=lambda row: row.name)  # a former one stays before its successor
                lines = fitting([self._line(row) for row in rows], shutil.get_terminal_size())
                if lines != self._drawn:
                    self._draw(lines)
                await trio.sleep(REDRAW)
        finally:
            self._draw([])

    def _line(self, row: Row) -> str:
        name = f"{row.name}: " if row.name else ""
        return printable(name + row.line(trio.current_time()))

    def _draw(self, lines: list[str], above: str = "") -> None:
        erase = CLEAR + (UP + CLEAR) * (len(self._drawn) - 1) if self._drawn else ""
        self.err.put(erase + above + "\n".join(lines))
        self._drawn = lines


def fitting(lines: list[str], size: tuple[int, int]) -> list[str]:
    """As much of the lines as a terminal of (columns, lines) shows without wrapping and without scrolling."""
    columns, height = size
    most = max(1, height - 1)
    if len(lines) > most:
        lines = [*lines[: most - 1], f"and {len(lines) - most + 1} more"]
    return [line[: columns - 1] for line in lines]


def traffic(now: Stats, before: Stats, interval: float) -> str:
    """`3 visitors now, 40 served   up 1.2 MiB (3 KiB/s)   down 20 MiB (1.1 MiB/s)   8 parked`."""
    failed = f", {now.failed} failed" if now.failed else ""
    up, down = (int(max(0, new - old) / interval) for new, old in ((now.up, before.up), (now.down, before.down)))
    return (
        f"{now.now} visitor{'' if now.now == 1 else 's'} now, {now.served} served{failed}"
        f"   up {octets(now.up)} ({octets(up)}/s)   down {octets(now.down)} ({octets(down)}/s)   {now.parked} parked"
    )


HELD = 10_000
"""Lines that wait for a slow reader: a few megabytes. Then the oldest go."""
PAUSE = 0.02
"""Seconds between two writes: under load a thousand lines leave together, and nobody notices the delay."""
FAREWELL = 1.0
"""Seconds that the last lines have at the end."""


class Writer:
    """What goes to one descriptor."""

    def __init__(self, descriptor: int, *, vital: bool) -> None:
        """`vital`: without a reader there is no point in going on, so `run` raises; else lines are dropped."""
        self._descriptor = descriptor
        self._vital = vital
        self._lines: deque[str] = deque(maxlen=HELD)
        self._some = trio.Event()
        self._ending = False

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Writer]:
        """Write during the block; what was put before its end is still written, in bounded time."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._run)
            try:
                yield self
            finally:
                self._ending = True
                self._some.set()
                nursery.cancel_scope.deadline = trio.current_time() + FAREWELL
                nursery.cancel_scope.shield = True

    @property
    def is_terminal(self) -> bool:
        """Whether a person reads it as it comes."""
        return os.isatty(self._descriptor)

    def put(self, text: str) -> None:
        """Write `text`, soon. Never waits, never raises."""
        self._lines.append(text)
        self._some.set()

    async def _run(self) -> None:
        while not (self._ending and not self._lines):
            await self._some.wait()
            self._some = trio.Event() if not self._ending else self._some
            text = "".join(self._lines)
            self._lines.clear()
            try:
                await trio.to_thread.run_sync(self._write, text.encode(errors="replace"), abandon_on_cancel=True)
            except OSError as error:
                if self._vital:
                    kind = OutputGoneError if isinstance(error, BrokenPipeError) else OutputError
                    raise kind(f"could not write to standard output: {reason_of(error)}") from None
            await trio.sleep(0 if self._ending else PAUSE)

    def _write(self, data: bytes) -> None:
        """In a thread: all of it, also where somebody made the descriptor non-blocking."""
        while data:
            try:
                data = data[os.write(self._descriptor, data) :]
            except BlockingIOError:
                select.select([], [self._descriptor], [])
