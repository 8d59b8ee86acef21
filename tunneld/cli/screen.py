"""A whole screen of a terminal: the alternate screen, drawn anew at each change, and the former one afterwards."""

from __future__ import annotations

import shutil

import trio

from tunneld.cli.board import STOP_TIMEOUT, View
from tunneld.cli.keyboard import is_foreground
from tunneld.cli.styled import render
from tunneld.cli.writer import Writer

ENTER, LEAVE = "\x1b[?1049h\x1b[?25l\x1b[2J", "\x1b[?25h\x1b[?1049l"
"""Save the screen and hide the cursor; show the cursor and restore the screen: see xterm's control sequences."""


class Screen:
    """Draws a view that fills the terminal."""

    def __init__(self, out: Writer, view: View, *, colours: bool) -> None:
        self._out = out
        self._view = view
        self._colours = colours
        self._drawn: list[str] = []
        self._entered = False
        self._wanted = trio.Event()

    async def run(self) -> None:
        """Draw the view each time that `draw` was called, once the former drawing has been written."""
        while True:
            await self._wanted.wait()
            self._wanted = trio.Event()
            await self._out.flush()
            self.paint()

    def draw(self) -> None:
        """Have the view drawn soon: it has changed."""
        self._wanted.set()

    def paint(self) -> None:
        """Draw the view now, unless another process has the terminal."""
        if not is_foreground(self._out.descriptor):
            return
        size = shutil.get_terminal_size()
        shown = self._view.lines(trio.current_time(), size)[: size.lines]
        lines = [render(line, colours=self._colours) for line in shown]
        if not self._entered:
            self._out.draw(ENTER)
            self._entered, self._drawn = True, []
        former = [*self._drawn, *[""] * (len(lines) - len(self._drawn))]
        changed = [
            f"\x1b[{number};1H{line}\x1b[K"
            for number, (line, old) in enumerate(zip(lines, former, strict=False), 1)
            if line != old
        ]
        rest = f"\x1b[{len(lines) + 1};1H\x1b[J" if len(former) > len(lines) and len(lines) < size.lines else ""
        if changed or rest:
            self._out.draw("".join(changed) + rest)
        self._drawn = lines

    def redraw(self) -> None:
        """Draw everything anew: the size has changed, or this process continues."""
        if self._entered:
            self._out.draw("\x1b[2J")
        self._drawn = []
        self._wanted.set()

    def leave(self) -> None:
        """Restore the former screen. Harmless when repeated."""
        if self._entered:
            self._out.draw(LEAVE)
            self._entered = False

    async def stop(self) -> None:
        """Do that before this process stops."""
        self.leave()
        with trio.move_on_after(STOP_TIMEOUT):
            await self._out.flush()
