"""The journal of the machine, followed from the beginning: whoever waits for a line is woken by it."""

from __future__ import annotations

import json
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any

from tests.machine.inside.tools import PATIENCE, WrongError, sh

Line = dict[str, Any]
NATIVE = "/run/systemd/journal/socket"


class Journal:
    """Lines since the machine was booted, in a thread; their times are those of the monotonic clock."""

    def __init__(self) -> None:
        self._lines: list[Line] = []
        self._heard = threading.Condition()
        self._following = False
        self._marks = count()

    def since(self, moment: float, matches: Callable[[Line], bool]) -> list[Line]:
        """What matches and was said from then on until now: all of it, and not only what has been read so far."""
        self._catch_up()
        with self._heard:
            return self._found(moment, matches)

    def wait(self, moment: float, matches: Callable[[Line], bool], what: str) -> Line:
        """The first line that matches, waited for. Raises `WrongError`."""
        self._follow()
        with self._heard:
            if not self._heard.wait_for(lambda: self._found(moment, matches), PATIENCE):
                raise WrongError(f"{what}: not within {PATIENCE:.0f} s")
            return self._found(moment, matches)[0]

    def tail(self, moment: float, most: int) -> Sequence[str]:
        """The last lines since then, for people."""
        lines = self.since(moment, lambda _: True)[-most:]
        return [f"    | {when_of(line):8.1f} {line.get('SYSLOG_IDENTIFIER', '?')}: {line['MESSAGE']}" for line in lines]

    def _found(self, moment: float, matches: Callable[[Line], bool]) -> list[Line]:
        return [line for line in self._lines if when_of(line) >= moment and matches(line)]

    def _follow(self) -> None:
        if not self._following:
            self._following = True
            threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        words = ["journalctl", "--boot", "--lines=all", "--follow", "--output=json"]
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as following:
            for line in following.stdout or ():
                with self._heard:
                    self._lines.append(_read_line(line))
                    self._heard.notify_all()

    def _catch_up(self) -> None:
        """What was written to the journal before is read now: a mark that comes after it has been."""
        self._follow()
        sh("journalctl --sync")
        mark = f"mark {next(self._marks)}"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as native:
            native.sendto(f"MESSAGE={mark}\nSYSLOG_IDENTIFIER=steps\n".encode(), NATIVE)
        self.wait(0, lambda line: line["MESSAGE"] == mark, f"the journal has {mark!r}")


JOURNAL = Journal()


def when_of(line: Line) -> float:
    """Seconds of the monotonic clock."""
    return int(line["__MONOTONIC_TIMESTAMP"]) / 1e6


def now() -> float:
    """The same, now."""
    return time.clock_gettime(time.CLOCK_MONOTONIC)


def _read_line(line: bytes) -> Line:
    read: Line = json.loads(line)
    message = read.get("MESSAGE") or ""
    read["MESSAGE"] = message if isinstance(message, str) else bytes(message).decode(errors="replace")
    return read


def messages(lines: Sequence[Line]) -> Iterator[str]:
    """What they say."""
    return (line["MESSAGE"] for line in lines)
