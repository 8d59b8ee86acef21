"""Child processes that never outlive the benchmark, and their resources according to /proc.

    Crew                    a temporary folder, and the processes that use it
    └─ Child ×N             each in a session of its own: Ctrl-C reaches only the benchmark, which ends them in order

A process that leaves its process group, as daemons do, is still our descendant: Linux gives orphans to the nearest
ancestor that is a subreaper, which `orphans_ended` makes this process.
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
SYSTEM_FOLDERS = "/usr/local/sbin:/usr/sbin:/sbin"  # folders of daemons, not in the PATH of ordinary users
PATIENCE = 15.0  # seconds for a program to start; Python on a busy machine takes two
GRACE = 3.0  # seconds for a program to end before it is killed
POLL_INTERVAL = 0.02  # seconds between two checks of a program that is starting or ending
MANY_DESCRIPTORS = 1 << 16  # more is of no use here, and some programs reserve memory for each permitted descriptor
SET_CHILD_SUBREAPER = 36  # prctl(2)

Address = tuple[str, int]
T = TypeVar("T")


class BenchError(Exception):
    """A required program is missing, did not start, or failed."""


def find(program: str) -> str | None:
    """Return the path of a program; None if it is not installed."""
    return shutil.which(program, path=f"{os.environ.get('PATH', os.defpath)}:{SYSTEM_FOLDERS}")


def need(program: str) -> str:
    """Return the path of a program. Raises `BenchError` if it is not installed."""
    path = find(program)
    if path is None:
        raise BenchError(f"{program} is not on PATH")
    return path


def free_port() -> int:
    """Return a free port, for programs that cannot choose one themselves."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


@cache
def descriptor_limit() -> int:
    """Raise the descriptor limit of this process and its children as far as possible. Returns the usable number."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return min(hard, MANY_DESCRIPTORS)


@dataclass(frozen=True, slots=True)
class Child:
    """A running program. Its output goes to a file, so that it never waits for a reader."""

    name: str
    process: subprocess.Popen[bytes]
    output: Path

    def line(self, parse: Callable[[str], T | None]) -> T:
        """Wait for a line of output for which `parse` returns a value. Raises `BenchError`."""
        for _ in self._polls("did not report that it is ready"):
            lines = self.output.read_text(errors="replace").splitlines(keepends=True)
            for line in lines:
                with suppress(ValueError):
                    if line.endswith("\n") and (found := parse(line)) is not None:
                        return found
        raise AssertionError

    def listening(self, port: int) -> Address:
        """Wait until the program listens on a port of loopback. Raises `BenchError`."""
        for _ in self._polls(f"did not listen on port {port}"):
            with suppress(OSError), socket.create_connection((LOOPBACK, port), timeout=PATIENCE) as probe:
                if probe.getsockname() != probe.getpeername():  # a socket can connect to itself on a free port
                    return LOOPBACK, port
        raise AssertionError

    def tree(self) -> list[int]:
        """Return the ids of the process and its descendants."""
        return [self.process.pid, *descendants(self.process.pid)]

    def _polls(self, failure: str) -> Iterator[None]:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise BenchError(f"{self.name} exited with status {self.process.returncode}: {self._last_line()}")
            yield
            time.sleep(POLL_INTERVAL)
        raise BenchError(f"{self.name} {failure} within {PATIENCE:.0f} s: {self._last_line()}")

    def _last_line(self) -> str:
        lines = self.output.read_text(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "no output")


class Crew:
    """The processes of one topology or server. They are ended when the block ends, the last started first."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self.folder = Path()
        self.children: list[Child] = []

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
        """Enter a context that ends after all processes that are started from now on."""
        self._stack.enter_context(context)

    def start(self, name: str, command: Sequence[str | Path]) -> Child:
        """Start a program. Raises `OSError`."""
        output = self.folder / f"{name}.out"
        with output.open("wb") as file:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, cwd=ROOT, start_new_session=True
            )
        self._stack.callback(_end, process)
        child = Child(name, process, output)
        self.children.append(child)
        return child


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a program and its process group. TERM is sent twice, since the first one may only start a drain."""
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
    """End all descendants of this process at the end of the block."""
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
            time.sleep(POLL_INTERVAL)


def descendants(pid: int) -> list[int]:
    """Return the ids of all descendants of a process, zombies included."""
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
    """Return the resident memory (RSS) of processes in bytes. A page that several share counts for each."""
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Rss:"):
                total += int(line.split()[1]) * 1024
    return total


def cpu_seconds(pids: Sequence[int]) -> float:
    """Return the processor time of processes so far, in seconds."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def descriptors(pids: Sequence[int]) -> int:
    """Return the number of open descriptors of processes."""
    return sum(1 for pid in pids for _ in Path(f"/proc/{pid}/fd").iterdir())
