"""`python -m benchmarks.calls`: how many functions of tunneld are called for one thing, in the relay and the agent.

Calls cost about as much as system calls, and unlike times they can be counted on a busy machine. Both programs run
with their defaults and a profile hook (`sys.setprofile`) that counts calls of functions of the package; imports are not
counted. Each number is the median of several samples, since timers call something now and then, too.

    first visit    a visitor connects, sends 5 bytes and gets 5 back; webmux, no TLS
    leaves         the visitor closes its connection
    leg            5 bytes more there and back, a quarter of that: visitor to relay, relay to agent, and back
    openTunnel     a line of the control protocol until its answer, in the relay
    expose         `tunnel expose` from its start to the answer of its first visitor

`--list` also prints the functions of the last sample of each, in the order of their calls.
"""

from __future__ import annotations

import argparse
import mmap
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit

from benchmarks.processes import LOOPBACK, Address, Child, Crew
from benchmarks.topologies import TUNNEL_TOML, _control_uri

SAMPLES = 9
QUIET = 0.02
"""Seconds without a call after which something is over."""
START_QUIET = 1.0
"""The same for the start of the relay, which waits for its disk."""
WORDS = struct.Struct("QQ")
"""What a program shares with the benchmark: the number of calls, and whether it is to list them."""

COUNTED = """
import mmap, os, sys
file, names, program, *arguments = sys.argv[1:]
import tunneld
from importlib import import_module
main = import_module("tunneld.cli." + program).main
shared = memoryview(mmap.mmap(os.open(file, os.O_RDWR), 16)).cast("Q")
root, functions, listed, count = os.path.dirname(tunneld.__file__) + os.sep, 1, open(names, "a", buffering=1), 0
imports = 0  # modules whose code runs now
def on_event(frame, event, _):
    global count, imports
    code = frame.f_code
    if code.co_name == "<module>":
        imports += {"call": 1, "return": -1}.get(event, 0)
    elif not imports and event == "call" and code.co_flags & functions and code.co_filename.startswith(root):
        count += 1
        shared[0] = count
        if shared[1]:
            listed.write(f"{code.co_filename[len(root):]} {code.co_name}\\n")
sys.setprofile(on_event)
sys.exit(main(arguments))
"""
"""Runs `tunneld` or `tunnel`. The code of modules and classes is not that of functions (CO_OPTIMIZED)."""


class Program:
    """A program that counts its calls."""

    def __init__(self, crew: Crew, name: str, *arguments: str | Path, lists: bool = False) -> None:
        """`lists`: list the calls from the start."""
        self._names = crew.file(f"{name}.names", "")
        file = crew.file(f"{name}.calls", "\0" * WORDS.size)
        with file.open("r+b") as opened:
            self._shared = mmap.mmap(opened.fileno(), WORDS.size)
        self.list_calls(on=lists)
        self.child: Child = crew.start(name, [sys.executable, "-P", "-c", COUNTED, file, self._names, name, *arguments])

    @property
    def calls(self) -> int:
        """Calls so far."""
        return int(WORDS.unpack(self._shared[:])[0])

    def list_calls(self, *, on: bool) -> None:
        """Begin or end to list calls."""
        self._shared[8:16] = struct.pack("Q", on)

    def listed(self) -> list[str]:
        """The functions that were listed, and forget them."""
        names = self._names.read_text().splitlines()
        self._names.write_text("")
        return names


class Counts:
    """Counts the calls of some programs, and prints them."""

    def __init__(self, *, lists: bool) -> None:
        self.lists = lists
        self.rows: list[tuple[str, str]] = []

    def of(self, title: str, programs: list[Program], act: Callable[[], None], legs: int = 1) -> None:
        """Do `act` several times, and add a row with the median of the calls."""
        samples, names = [], list[list[str]]()
        for _ in range(SAMPLES):
            settle(programs)
            for program in programs:
                program.list_calls(on=self.lists)
            before = [program.calls for program in programs]
            act()
            settle(programs)
            samples.append([program.calls - start for program, start in zip(programs, before, strict=True)])
            for program in programs:
                program.list_calls(on=False)
            names = [program.listed() for program in programs]
        self.add(title, [program.child.name for program in programs], sorted(samples, key=sum)[SAMPLES // 2], legs)
        self._print(title, programs, names)

    def print_names(self, title: str, programs: list[Program]) -> None:
        """Print what was listed since then, if it was."""
        for program in programs:
            program.list_calls(on=False)
        self._print(title, programs, [program.listed() for program in programs])

    def _print(self, title: str, programs: list[Program], names: list[list[str]]) -> None:
        for program, listed in zip(programs, names, strict=True):
            print(*(f"  {title} {program.child.name} {name}" for name in listed), sep="\n", end="\n" if listed else "")

    def add(self, title: str, names: list[str], calls: list[int], legs: int = 1) -> None:
        """Add a row."""
        parts = " + ".join(f"{name} {count}" for name, count in zip(names, calls, strict=True))
        self.rows.append(
            (title, f"{sum(calls) / legs:8.1f}" + (f"  ({parts})" if legs == 1 else f"  ({parts}) / {legs}"))
        )


def settle(programs: list[Program], quiet: float = QUIET) -> None:
    """Wait until no program has called anything for `quiet` seconds."""
    before: list[int] = []
    while before != (before := [program.calls for program in programs]):
        time.sleep(quiet)


@contextmanager
def echo() -> Iterator[Address]:
    """A server that sends back what it receives, in a thread for each connection."""

    def serve(connection: socket.socket) -> None:
        with connection:
            while data := connection.recv(100):
                connection.sendall(data)

    def accept(listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            Thread(target=serve, args=(connection,), daemon=True).start()

    with socket.create_server((LOOPBACK, 0)) as listener:
        Thread(target=accept, args=(listener,), daemon=True).start()
        yield listener.getsockname()
        listener.shutdown(socket.SHUT_RDWR)


def ask(visitor: socket.socket) -> None:
    """Send 5 bytes and wait for the answer."""
    visitor.sendall(b"hello")
    if visitor.recv(100) != b"hello":
        raise SystemExit("no answer")


def open_tunnel(control: socket.socket) -> None:
    """Open a tunnel on a control connection."""
    control.sendall(b"openTunnel webmux\n")
    while not (line := control.recv(4096)).endswith(b"\n"):
        pass
    if not line.startswith(b"OK"):
        raise SystemExit(line.decode())


def main() -> int:
    """Count, and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calls", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--list", action="store_true", help="print the functions, too")
    counts = Counts(lists=parser.parse_args().list)
    with Crew() as crew, echo() as server:
        relay = Program(crew, "tunneld", "--config", crew.file("tunnel.toml", TUNNEL_TOML), "--log-format", "json")
        control = relay.child.line(_control_uri)
        at = control.hostname or "", control.port or 0
        where = f"{control.scheme}://{control.hostname}:{control.port}"
        settle([relay], START_QUIET)
        before = relay.calls
        target = f"{server[0]}:{server[1]}"
        relay.list_calls(on=counts.lists)
        words = ("expose", target, "--relay", where, "--backend", "webmux", "--quiet")
        agent = Program(crew, "tunnel", *words, lists=counts.lists)
        public = agent.child.line(lambda line: urlsplit(line.strip()) if line.startswith("tcp://") else None)
        both, address = [relay, agent], (public.hostname or "", public.port or 0)
        with socket.create_connection(address) as visitor:
            ask(visitor)
            settle(both)
            counts.add("expose", ["tunneld", "tunnel"], [relay.calls - before, agent.calls])
            counts.print_names("expose", both)
            counts.of("leg", both, lambda: ask(visitor), legs=4)
        visitors: list[socket.socket] = []

        def visit() -> None:
            visitors.append(socket.create_connection(address))
            ask(visitors[-1])

        counts.of("first visit", both, visit)
        counts.of("leaves", both, lambda: visitors.pop().close())
        with socket.create_connection(at) as session:
            session.recv(4096)  # the greeting
            counts.of("openTunnel", [relay], lambda: open_tunnel(session))
    for title, text in sorted(counts.rows):
        print(f"{title:12}{text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
