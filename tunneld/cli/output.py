"""Where an agent's output goes, and which reporter writes it: lines, JSON, or a live view on a terminal."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

from tunneld.agent.events import Reporter
from tunneld.cli.board import Board, View
from tunneld.cli.keyboard import Keyboard, is_foreground
from tunneld.cli.reporters import JsonReporter, LineReporter, QuietReporter, local_time
from tunneld.cli.styled import has_colours
from tunneld.cli.writer import Writer
from tunneld.log import is_journal

STDOUT, STDERR = 1, 2


@dataclass(frozen=True, slots=True)
class AgentOutput:
    """Standard output and standard error, and the board on the latter. `is_live`: a view can be shown; `has_keys`: and
    keys can be read.
    """

    out: Writer
    err: Writer
    board: Board
    is_live: bool
    has_keys: bool

    async def show(self, view: View, on_key: Callable[[str], object]) -> None:
        """Show a view until cancelled, and give it the keys that are pressed. Without a live terminal, do nothing."""
        if not self.is_live:
            return
        board, self.board.view = self.board, view

        def press(key: str) -> None:
            on_key(key)
            board.redraw()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(board.run)
            if self.has_keys:
                nursery.start_soon(Keyboard(press, on_stop=board.stop, on_change=board.redraw).run)


@asynccontextmanager
async def open_output(options: argparse.Namespace) -> AsyncIterator[AgentOutput]:
    """Open both for the length of the block.

    Only with `--json` does the agent end when the reader of standard output is gone: nothing else reads its events. A
    script that has read the address needs no more of it.
    """
    async with Writer(STDERR, vital=False).open() as err:
        board = Board(err, colours=has_colours())

        def on_failure(reason: str) -> None:
            board.notice(f"{reason}; the agent keeps serving, and prints no more addresses there")

        async with Writer(STDOUT, vital=options.json, on_failure=on_failure).open() as out:
            is_live = not (options.json or options.quiet) and is_live_terminal(err)
            yield AgentOutput(out, err, board, is_live, is_live and sys.stdin is not None and sys.stdin.isatty())


def is_live_terminal(err: Writer) -> bool:
    """Whether a view can be drawn: on a terminal that understands more than lines, and that is ours."""
    return err.is_terminal and os.environ.get("TERM", "dumb") != "dumb" and is_foreground(err.descriptor)


def line_reporter(options: argparse.Namespace, output: AgentOutput, scheme: str, name: str = "") -> Reporter:
    """The reporter without a view that fits the options; see reporters.py."""
    if options.json:
        return JsonReporter(output.out, scheme, name)
    kind = QuietReporter if options.quiet else LineReporter
    return kind(output.out, output.err, scheme, name, clock=str if is_journal(sys.stderr) else local_time)
