"""The lower lines of a terminal: a view that is updated in place, below permanent lines.

Only lines that changed are written again, so that text can be selected with the mouse meanwhile, and nothing is written
while another process has the terminal.
"""

from __future__ import annotations

import os
import shutil
from typing import Protocol

import trio

from tunneld.cli.keyboard import is_foreground
from tunneld.cli.styled import DIM, PLAIN, Line, render, width
from tunneld.cli.writer import Writer

REDRAW_INTERVAL = 0.5
"""Seconds between two updates of the view."""
STOP_TIMEOUT = 0.3
"""Seconds for the view to be erased before this process stops (Ctrl-Z); a terminal may take nothing (Ctrl-S)."""
CLEAR_LINE = "\r\x1b[K"
"""Moves the cursor to the first column and erases the line."""
CLEAR_BELOW = "\r\x1b[J"
"""Does the same, and erases all lines below."""


class View(Protocol):
    """What is drawn."""

    def lines(self, now: float, size: os.terminal_size) -> list[Line]:
        """The lines at `now`, in `trio.current_time`, for a terminal of this size. A line that is too wide wraps."""


class Board:
    """Draws a view, and prints lines above it."""

    def __init__(self, err: Writer, *, colours: bool = False) -> None:
        self.err = err
        self.colours = colours
        self.view: View | None = None
        self._drawn: list[str] = []
        self._widths: list[int] = []  # of these lines, in columns
        self._wake = trio.Event()

    def notice(self, text: str, style: str = PLAIN, *, time: str = "") -> None:
        """Print a permanent line above the view, perhaps with the time in front."""
        before = [(f"{time} ", DIM)] if time else []
        self._draw([], render([*before, (text, style)], colours=self.colours) + "\n")

    def redraw(self) -> None:
        """Draw the view now."""
        self._wake.set()

    async def run(self) -> None:
        """Draw the view until cancelled, then erase it."""
        try:
            while True:
                if self.view is not None and not self.err.queued and is_foreground(self.err.descriptor):
                    self._draw(self.view.lines(trio.current_time(), shutil.get_terminal_size()))
                with trio.move_on_after(REDRAW_INTERVAL):
                    await self._wake.wait()
                self._wake = trio.Event()
        finally:
            self._draw([])

    async def stop(self) -> None:
        """Erase the view: this process is about to stop."""
        self._draw([])
        with trio.move_on_after(STOP_TIMEOUT):
            await self.err.flush()

    def _draw(self, lines: list[Line], above: str = "") -> None:
        rendered = [render(line, colours=self.colours) for line in lines]
        widths = [width(line) for line in lines]
        columns = shutil.get_terminal_size().columns
        fits = all(one <= columns for one in (*widths, *self._widths))
        if above or not fits or len(rendered) != len(self._drawn):
            text = self._erase(columns) + above + "\n".join(rendered)
        else:
            text = self._changes(rendered)
        if text and (rendered != self._drawn or above):
            self.err.draw(text)
        self._drawn, self._widths = rendered, widths

    def _erase(self, columns: int) -> str:
        """Erase what is drawn. After a change of the terminal's size, long lines may have been wrapped."""
        if not self._drawn:
            return ""
        rows = sum(max(1, -(-one // max(1, columns))) for one in self._widths)
        return (f"\x1b[{rows - 1}A" if rows > 1 else "") + CLEAR_BELOW

    def _changes(self, lines: list[str]) -> str:
        """Write the lines that differ from what is drawn, which are as many."""
        up = f"\x1b[{len(lines) - 1}A" if len(lines) > 1 else ""
        changed = (f"{CLEAR_LINE}{new}" if new != old else "" for new, old in zip(lines, self._drawn, strict=True))
        return up + "\n".join(changed)
