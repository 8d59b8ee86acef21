"""Child processes that never outlive the benchmark, and what /proc says of them.

    Crew                    one temporary folder, and the processes that work in it
    └─ Child ×N             each in a session of its own, so that Ctrl-C reaches us alone and we end them in order

Whoever daemonizes or forks away from its group is still a descendant of ours: Linux gives orphans to the nearest
ancestor that asked for them, and `orphans_ended` asks.
"""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Self, TypeVar

LOOPBACK = "127.0.0.1"
ROOT = Path(__file__).resolve().parent.parent
SYSTEM_FOLDERS = "/usr/local/sbin:/usr/sbin:/sbin"  # where daemons live, and what an ordinary PATH leaves out
PATIENCE = 15.0  # seconds for a program to start; Python on a busy machine takes two
GRACE = 3.0  # seconds for a program to end before it is killed
LOOK = 0.02  # seconds between two looks at a program that is starting or ending
MANY_DESCRIPTORS = 1 << 16  # as many as can be of use here; some programs reserve memory for each that is allowed
SET_CHILD_SUBREAPER = 36  # prctl(2)

Address = tuple[str, int]
T = TypeVar("T")


class BenchError(Exception):
    """A program that is needed here is missing, did not start, or failed."""


def find(program: str) -> str | None:
    """The path of a program, if it is installed."""
    return shutil.which(program, path=f"{os.environ.get('PATH', os.defpath)}:{SYSTEM_FOLDERS}")


def need(program: str) -> str:
    """The path of a program. Raises `BenchError`."""
    path = find(program)
    if path is None:
        raise BenchError(f"{program} is not on PATH")
    return path


def free_port() -> int:
    """A port that nobody listens on, for programs that cannot be told to take any."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


@cache
def descriptor_limit() -> int:
    """Raise our limit of descriptors, and that of all programs started from here, as far as it goes."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return min(hard, MANY_DESCRIPTORS)


@dataclass(frozen=True, slots=True)
class Child:
    """A running program; what it prints is in a file, so that it never waits for a reader."""

    name: str
    process: subprocess.Popen[bytes]
    output: Path

    def line(self, parse: Callable[[str], T | None]) -> T:
        """Wait for a line of its output of which `parse` makes something. Raises `BenchError`."""
        for _ in self._looks("did not say that it is ready"):
            lines = self.output.read_text(errors="replace").splitlines(keepends=True)
            for line in lines:
                with suppress(ValueError):
                    if line.endswith("\n") and (found := parse(line)) is not None:
                        return found
        raise AssertionError

    def listening(self, port: int) -> Address:
        """Wait until it listens on a port of loopback. Raises `BenchError`."""
        for _ in self._looks(f"did not listen on port {port}"):
            with suppress(OSError), socket.create_connection((LOOPBACK, port), timeout=PATIENCE) as probe:
                if probe.getsockname() != probe.getpeername():  # a socket may connect to itself where nobody listens
                    return LOOPBACK, port
        raise AssertionError

    def tree(self) -> list[int]:
        """The process and its descendants."""
        return [self.process.pid, *descendants(self.process.pid)]

    def _looks(self, failure: str) -> Iterator[None]:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise BenchError(f"{self.name} ended with status {self.process.returncode}: {self._last_words()}")
            yield
            time.sleep(LOOK)
        raise BenchError(f"{self.name} {failure} in {PATIENCE:.0f} s: {self._last_words()}")

    def _last_words(self) -> str:
        lines = self.output.read_text(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")


class Crew:
    """The processes of one topology or server. Leaving the block ends them, the last started first."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self.folder = Path()

    def __enter__(self) -> Self:
        self.folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="benchmark-")))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def file(self, name: str, text: str) -> Path:
        """Write a file into the folder."""
        path = self.folder / name
        path.write_text(text)
        return path

    def share(self, context: AbstractContextManager[object]) -> None:
        """Enter a context that ends after the processes that are started from now on."""
        self._stack.enter_context(context)

    def start(self, name: str, command: Sequence[str | Path]) -> Child:
        """Start a program. Raises `OSError`."""
        output = self.folder / f"{name}.out"
        with output.open("wb") as file:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, cwd=ROOT, start_new_session=True
            )
        self._stack.callback(_end, process)
        return Child(name, process, output)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a program and what it has forked. TERM twice: to some the first only means to finish what they do."""
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE / 2)
            break
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # the rest of its group
    process.wait()


@contextmanager
def orphans_ended() -> Iterator[None]:
    """At the end of the block, nobody whom we or our children have started is left."""
    ctypes.CDLL(None).prctl(SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        deadline = time.monotonic() + GRACE
        while left := descendants(os.getpid()):
            if time.monotonic() > deadline:
                for pid in left:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(-1, os.WNOHANG)
            time.sleep(LOOK)


def descendants(pid: int) -> list[int]:
    """The processes that descend from one, zombies included."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with suppress(OSError):
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(folder.name))
    found: list[int] = []
    fresh = children.get(pid, [])
    while fresh:
        found += fresh
        fresh = [grandchild for child in fresh for grandchild in children.get(child, [])]
    return found


def resident(pids: Sequence[int]) -> int:
    """The octets of memory that processes have resident (RSS); pages that they share count for each."""
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Rss:"):
                total += int(line.split()[1]) * 1024
    return total


def descriptors(pids: Sequence[int]) -> int:
    """The descriptors that processes have open."""
    return sum(1 for pid in pids for _ in Path(f"/proc/{pid}/fd").iterdir())
