"""Measure a relay with many open tunnels: `python -m benchmarks.many [COUNT]`.

It opens COUNT (10 000) tunnels of the webmux backend through one control connection and prints, at steps, the time of
an `openTunnel` and the memory of the relay. Then it lists all of them over each interface, while a bystander in another
process measures the round trips of one byte through a tunnel of its own. The columns `turn` are the processor time of
the relay's turns meanwhile, see turns.py: by how much a list delays a visitor, on a busy machine, too; and that of the
longest full collection of garbage among them.
"""

from __future__ import annotations

import http.client
import multiprocessing
import os
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event

from benchmarks.processes import LOOPBACK, Crew, descriptor_limit, free_port, orphans_ended, resident
from benchmarks.turns import Turns

SAMPLE = 200
"""Tunnels opened for each figure."""
LISTS = 5
"""Requests for each interface."""
FREE_PORTS = 100
"""Ports of the range that stay free at the end: looking for one must not take longer when few are left."""

CONFIG = """
[control]
port = {control}
idle_timeout = 3600.0
[http]
enabled = true
port = {http}
[webmux]
port = {webmux}
[tunnels]
ports = "{first}-{last}"
max_tunnels = {most}
open_timeout = 3600.0
[daemon]
state = "{state}"
[log]
level = "warning"
"""


class Control:
    """A control connection: requests and replies in turn."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection((LOOPBACK, port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._file = self._socket.makefile("rb")
        self._file.readline()  # the greeting

    def ask(self, request: str) -> str:
        """Send a request; returns the last line of its reply."""
        self._socket.sendall(request.encode() + b"\n")
        while (line := self._file.readline()).startswith(b" "):
            pass
        text = line.decode().strip()
        if not text.startswith("OK"):
            raise SystemExit(f"{request}: {text}")
        return text.removeprefix("OK").strip()


def cpu_seconds(pid: int) -> float:
    """The processor time of a process so far."""
    with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def open_tunnels(control: Control, count: int) -> list[float]:
    """Open tunnels; returns the seconds that each took."""
    taken = []
    for _ in range(count):
        began = time.perf_counter()
        control.ask("openTunnel webmux persist=yes")
        taken.append(time.perf_counter() - began)
    return taken


def measure_opening(control: Control, pid: int, count: int) -> None:
    """Open `count` tunnels and print the cost of opening one at every tenth."""
    open_tunnels(control, SAMPLE)  # what is made once
    before, opened = resident([pid]), 0
    print("open tunnels   openTunnel, least and median µs   processor µs   memory per tunnel, KiB")
    for step in range(11):
        target = count * step // 10
        while opened < target - SAMPLE:
            opened += len(open_tunnels(control, min(SAMPLE, target - SAMPLE - opened)))
        used, taken = cpu_seconds(pid), open_tunnels(control, SAMPLE)
        used, opened = cpu_seconds(pid) - used, opened + SAMPLE
        each = (resident([pid]) - before) / opened / 1024
        least, usual = min(taken) * 1e6, statistics.median(taken) * 1e6
        print(f"{opened:12}   {least:18.0f}   {usual:12.0f}   {used / SAMPLE * 1e6:12.0f}   {each:23.1f}", flush=True)


def echo(port: int) -> None:
    """A hidden server that returns what it gets, for one visitor."""
    server = socket.create_connection((LOOPBACK, port))
    server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while data := server.recv(4096):
        server.sendall(data)


def stand_by(server_port: int, client_port: int, stop: Event, report: Connection) -> None:
    """Send single bytes through the tunnel until stopped; reports the round trips in seconds."""
    threading.Thread(target=echo, args=(server_port,), daemon=True).start()
    visitor = socket.create_connection((LOOPBACK, client_port))
    visitor.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    taken = []
    report.send("ready")
    while not stop.is_set():
        began = time.perf_counter()
        visitor.sendall(b"x")
        visitor.recv(1)
        taken.append(time.perf_counter() - began)
        time.sleep(0.0005)
    report.send(taken)


@contextmanager
def bystander(control: Control) -> Iterator[list[float]]:
    """Measure round trips during the block; they are in the list after it."""
    server = control.ask("openTunnel tcp persist=yes")
    client = control.ask(f"getTunnelAddress {server}")
    ports = [int(uri.rpartition(":")[2]) for uri in (server, client)]
    stop = multiprocessing.Event()
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.Process(target=stand_by, args=(*ports, stop, theirs), daemon=True)
    process.start()
    taken: list[float] = []
    try:
        ours.recv()
        yield taken
    finally:
        stop.set()
        taken += ours.recv()
        process.join()
        control.ask(f"close {server}")


def measure_listing(control: Control, turns: Turns, interface: str, ask: Callable[[], int]) -> None:
    """Print how long a list takes over one interface, and what it costs the bystander."""
    with bystander(control) as taken:
        turns.begin()
        lengths, seconds = [], []
        for _ in range(LISTS if interface != "none" else 1):
            began = time.perf_counter()
            lengths.append(ask())
            seconds.append(time.perf_counter() - began)
        turn, longest, collection = turns.percentile(0.99), turns.percentile(1), turns.longest_collection
    taken.sort()
    p99, worst = taken[int(len(taken) * 0.99)] * 1e3, taken[-1] * 1e3
    print(
        f"{interface:9}   {lengths[0] / 1e6:9.1f}   {statistics.median(seconds):17.2f}"
        f"   {statistics.median(taken) * 1e3:20.2f}   {p99:8.1f}   {worst:12.1f}   {turn:12.1f}   {longest:11.1f}"
        f"   {collection:14.1f}",
        flush=True,
    )


def list_by_http(port: int, method: str, path: str, body: bytes, kind: str) -> int:
    """The length of the answer to a list over HTTP."""
    connection = http.client.HTTPConnection(LOOPBACK, port)
    connection.request(method, path, body or None, {"Content-Type": kind} if kind else {})
    answer = connection.getresponse()
    length = len(answer.read())
    if answer.status != http.HTTPStatus.OK:
        raise SystemExit(f"{path}: status {answer.status}")
    return length


def list_by_lines(port: int) -> int:
    """The length of the reply to a list over the control protocol."""
    with socket.create_connection((LOOPBACK, port)) as control:
        control.sendall(b"list\nquit\n")
        length = 0
        while data := control.recv(1 << 20):
            length += len(data)
    return length


def wait_a_moment() -> int:
    """Instead of a list."""
    time.sleep(3)
    return 0


def main(count: int) -> None:
    """Run the measurements."""
    descriptor_limit()
    with orphans_ended(), Crew() as crew:
        ports = {"control": free_port(), "http": free_port(), "webmux": free_port()}
        (crew.folder / "state").mkdir()
        last = 10000 + count + 2 * SAMPLE + FREE_PORTS
        text = CONFIG.format(**ports, first=10000, last=last, most=count + 1000, state=crew.folder / "state")
        turns = Turns(crew.folder / "turns")
        child = crew.start("tunneld", [*turns.command, "--config", crew.file("tunnel.toml", text)])
        child.listening(ports["control"])
        control, pid = Control(ports["control"]), child.process.pid
        turns.begin()
        measure_opening(control, pid, count)
        longest, collection = turns.percentile(1), turns.longest_collection
        print(f"longest turn meanwhile: {longest:.1f} ms, full collection: {collection:.1f} ms", end="")
        print(f"; of the latter {turns.long_collections} took more than 20 ms")
        call = b"<?xml version='1.0'?><methodCall><methodName>tunnel.list</methodName><params/></methodCall>"
        print("\ninterface      MB each   seconds for a list   bystander: median ms    p99 ms   slowest, ms", end="")
        print("   turn: p99 ms   longest, ms   collection, ms")
        measure_listing(control, turns, "none", wait_a_moment)
        measure_listing(control, turns, "lines", lambda: list_by_lines(ports["control"]))
        measure_listing(control, turns, "JSON", lambda: list_by_http(ports["http"], "GET", "/api/v1/list", b"", ""))
        measure_listing(
            control, turns, "XML-RPC", lambda: list_by_http(ports["http"], "POST", "/RPC2", call, "text/xml")
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000)
