"""A pseudo-terminal, and programs that run on it."""

from __future__ import annotations

import fcntl
import os
import struct
import sys
import termios
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Self

import trio

from tests.support.peers import PATIENCE
from tests.support.programs import program

TAKE_TERMINAL = (
    "import fcntl, os, signal, sys, termios; signal.signal(signal.SIGHUP, signal.SIG_DFL); "
    "fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execvp(sys.argv[1], sys.argv[1:])"
)
"""A program that makes its standard input the controlling terminal, and becomes another program, which does not ignore
SIGHUP even where the tests run under nohup.
"""


class Terminal:
    """A pseudo-terminal: its screen, and its mode."""

    def __init__(self) -> None:
        self.screen, self.device = os.openpty()
        self.seen = ""
        self.resize(30, 100)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.screen)
        os.close(self.device)

    def resize(self, lines: int, columns: int) -> None:
        """Change the size; programs get SIGWINCH."""
        fcntl.ioctl(self.screen, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    async def wait_for(self, text: str) -> None:
        """Wait until the screen has shown a text after what was waited for before."""
        with trio.fail_after(PATIENCE):
            while text not in self.seen:
                await trio.lowlevel.wait_readable(self.screen)
                self.seen += os.read(self.screen, 65536).decode(errors="replace")
        self.seen = self.seen.partition(text)[2]

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self.screen, text.encode())

    def echoes(self) -> bool:
        """Whether it echoes keys, as shells expect."""
        return bool(termios.tcgetattr(self.screen)[3] & termios.ECHO)


@asynccontextmanager
async def on_terminal(terminal: Terminal, *command: str, **options: Any) -> AsyncIterator[trio.Process]:
    """Run a program in a session of its own, with this controlling terminal."""
    given = dict.fromkeys(("stdin", "stdout", "stderr"), terminal.device)
    wrapped = [sys.executable, "-c", TAKE_TERMINAL, *command]
    async with program(wrapped, start_new_session=True, **(given | options)) as process:
        yield process
