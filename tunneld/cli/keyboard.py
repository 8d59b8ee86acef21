"""The terminal of a command that shows a live view: its keys and job control.

While the view is shown, keys arrive one by one and are not echoed; Ctrl-C and Ctrl-Z still are signals. The terminal
gets its former mode back whenever this process ends or stops, and it is left alone while another process has it.

    run   ┌─ in the foreground: read keys ◄──► in the background: wait
          └─ SIGTSTP (Ctrl-Z): give the terminal back, stop; SIGCONT (`fg`, `bg`), SIGWINCH: draw again
"""

from __future__ import annotations

import os
import signal
import sys
import termios
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress

import trio

FOREGROUND_CHECK = 0.5
"""Seconds between two looks whether this process is in the foreground again: shells do not tell."""
MAX_KEYS = 64
"""Bytes read at once; more is a text that was pasted."""
KEYS = {
    b"\x1b[A": "up", b"\x1bOA": "up", b"\x1b[B": "down", b"\x1bOB": "down", b"\x1b[D": "left", b"\x1bOD": "left",
    b"\x1b[C": "right", b"\x1bOC": "right", b"\x1b[5~": "page up", b"\x1b[6~": "page down", b"\x1b": "escape",
    b"\r": "enter", b"\n": "enter", b"\x7f": "backspace", b"\b": "backspace",
}  # fmt: skip
"""The names of the keys that are no character."""


def is_foreground(descriptor: int) -> bool:
    """Whether this process may use the terminal; True if that is not this session's terminal, or none."""
    try:
        return os.tcgetpgrp(descriptor) == os.getpgrp()
    except OSError:
        return True


def keys_in(data: bytes) -> list[str]:
    """The keys in what a terminal sent: characters, and the names in `KEYS`. Other sequences are ignored."""
    if (name := KEYS.get(data)) is not None:
        return [name]
    if data.startswith(b"\x1b"):
        return []
    return [KEYS.get(char.encode(), char) for char in data.decode(errors="ignore")]


class Keyboard:
    """Reads keys, and gives the terminal back."""

    def __init__(
        self,
        on_key: Callable[[str], object],
        *,
        on_stop: Callable[[], Awaitable[object]],
        on_change: Callable[[], object],
        descriptor: int | None = None,
    ) -> None:
        """`on_stop` clears the view before this process stops; `on_change` draws it again, also after a change of the
        terminal's size.
        """
        self._on_key = on_key
        self._on_stop = on_stop
        self._on_change = on_change
        self._descriptor = sys.stdin.fileno() if descriptor is None else descriptor
        self._former: list[object] | None = None  # the mode of the terminal, while it has ours

    async def run(self) -> None:
        """Read keys until cancelled."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._handle_signals)
                nursery.start_soon(self._read)
        finally:
            self._give_back()

    async def _read(self) -> None:
        while True:
            if not is_foreground(self._descriptor):
                await trio.sleep(FOREGROUND_CHECK)
                continue
            self._take()
            with trio.move_on_after(FOREGROUND_CHECK) as waiting:
                await trio.lowlevel.wait_readable(self._descriptor)
            if not waiting.cancelled_caught and is_foreground(self._descriptor):
                try:
                    data = os.read(self._descriptor, MAX_KEYS)
                except OSError:
                    return
                if not data:  # the terminal is gone
                    return
                for key in keys_in(data):
                    self._on_key(key)

    async def _handle_signals(self) -> None:
        numbers = [signal.SIGCONT, signal.SIGWINCH]
        if signal.getsignal(signal.SIGTSTP) is not signal.SIG_IGN:  # as under a shell without job control
            numbers.append(signal.SIGTSTP)
        with trio.open_signal_receiver(*numbers) as signals:
            async for number in signals:
                if number == signal.SIGTSTP:
                    await self._on_stop()
                    self._give_back()
                    stop_this_process()
                if is_foreground(self._descriptor):
                    self._take()
                self._on_change()

    def _take(self) -> None:
        """Have keys sent one by one, without echo."""
        if self._former is not None:
            return
        with suppress(termios.error), _despite_background():
            former = termios.tcgetattr(self._descriptor)
            mode = [*former[:6], [*former[6]]]
            mode[3] &= ~(termios.ECHO | termios.ICANON)
            mode[6][termios.VMIN], mode[6][termios.VTIME] = 1, 0
            termios.tcsetattr(self._descriptor, termios.TCSANOW, mode)
            self._former = former

    def _give_back(self) -> None:
        """Set the former mode of the terminal. Harmless when repeated."""
        former, self._former = self._former, None
        if former is not None:
            with suppress(termios.error), _despite_background():
                termios.tcsetattr(self._descriptor, termios.TCSANOW, former)  # type: ignore[arg-type]


@contextmanager
def _despite_background() -> Iterator[None]:
    """Let no change of the terminal's mode stop this process, see SIGTTOU in signal(7)."""
    former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def stop_this_process() -> None:
    """Stop as Ctrl-Z does; returns once the shell continues the process."""
    handler = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
    signal.pthread_kill(threading.get_ident(), signal.SIGTSTP)  # to this thread: it stops before the call returns
    signal.signal(signal.SIGTSTP, handler)
