"""What is measured: each load runs clients against one topology and returns figures."""

from __future__ import annotations

import math
import re
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field

from benchmarks import servers
from benchmarks.processes import Address, BenchError, cpu_seconds, descriptor_limit, descriptors, need, resident
from benchmarks.topologies import Reach

BUFFER = 1 << 20
RAMP = 0.3  # seconds until a stream's windows have opened
SILENCE = 10.0  # seconds after which a peer that moves nothing has failed
IDLE = 2000
"""Idle connections: enough that their memory stands out from blocks that the program allocates anyway."""
FEW = 500
"""Idle connections at the first measurement, which thus includes memory used only once or allocated in advance."""
CROWD = 20  # visitors that come at once
SETTLE = 0.7  # seconds for memory and descriptors to come to rest

Figures = dict[str, float]


@dataclass(frozen=True, slots=True)
class Measure:
    """One row of the table. `aims` are targets for tunneld ÷ peer; `limit` is a target for tunneld itself."""

    name: str
    title: str
    unit: str
    more_is_better: bool = True
    aims: dict[str, float] = field(default_factory=dict)
    limit: float | None = None

    def meets(self, value: float, bound: float) -> bool:
        """Whether a figure or a ratio meets a target."""
        return round(value, 2) >= bound if self.more_is_better else round(value, 2) <= bound

    def bound(self, bound: float) -> str:
        """Format a target."""
        return f"{'≥' if self.more_is_better else '≤'} {bound:g}"


@dataclass(frozen=True, slots=True)
class Load:
    """One way of using a topology."""

    name: str
    measures: tuple[Measure, ...]
    server: Callable[[int], AbstractContextManager[Address]]
    sample: Callable[[Reach, int], Figures]
    fresh: bool = False
    """Whether it measures the relay process, and so needs a new one for each sample."""
    warm_up: int = 1
    """Seconds of use before the first sample."""


def bulk(reach: Reach, seconds: int) -> Figures:
    """Measure one stream from the server. The kernel discards the bytes, which are only counted."""
    buffer = bytearray(BUFFER)
    with socket.create_connection(reach.address, timeout=SILENCE) as client:
        _discard(client, buffer, RAMP)
        hops = [pid for child in reach.hops for pid in child.tree()]
        before, start = cpu_seconds(hops), time.monotonic()
        size = _discard(client, buffer, seconds)
        figures = {"bulk": size * 8 / (time.monotonic() - start) / 1e9}
        if hops and size:
            figures["cpu"] = (cpu_seconds(hops) - before) / size * 1e12  # ms per GB
        return figures


def _discard(client: socket.socket, buffer: bytearray, seconds: float) -> int:
    total = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        got = client.recv_into(buffer, BUFFER, socket.MSG_TRUNC)
        if not got:
            raise BenchError("the stream ended early")
        total += got
    return total


def requests(connections: int, *headers: str) -> Callable[[Reach, int], Figures]:
    """Run `wrk` on this many connections: its rate, the median and 99th percentile of its latency in ms, and
    the processor time that both hops use for each request, in µs.
    """

    def sample(reach: Reach, seconds: int) -> Figures:
        host, port = reach.address
        fields = [part for header in headers for part in ("--header", header)]
        options = ["--threads", "1", "--connections", str(connections), "--duration", str(seconds), "--latency"]
        hops = [pid for child in reach.hops for pid in child.tree()]
        before = cpu_seconds(hops)
        figures = _wrk([need("wrk"), *options, *fields, f"http://{host}:{port}/"], seconds)
        if hops:
            figures["cpu"] = (cpu_seconds(hops) - before) / figures.pop("count") * 1e6
        return figures

    return sample


def _wrk(command: list[str], seconds: int) -> Figures:
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            start_new_session=True,
            timeout=seconds + SILENCE,
        )
    except subprocess.TimeoutExpired:
        raise BenchError("wrk did not end") from None
    rate = re.search(r"Requests/sec:\s+([\d.]+)", done.stdout)
    late = {percent: _latency(percent, done.stdout) for percent in (50, 99)}
    if done.returncode or rate is None or None in late.values() or float(rate[1]) == 0:
        raise BenchError(f"wrk got no answers: {(done.stderr or done.stdout).strip().splitlines()[-1:]}")
    count = re.search(r"(\d+) requests in", done.stdout)
    errors = re.search(r"connect (\d+), read (\d+), write (\d+), timeout (\d+)", done.stdout)
    refused = re.search(r"Non-2xx or 3xx responses: (\d+)", done.stdout)
    failed = sum(int(number) for found in (errors, refused) if found for number in found.groups())
    return {
        "rate": float(rate[1]),
        "count": float(count[1]) if count else math.inf,
        "p50": late[50] or 0.0,
        "p99": late[99] or 0.0,
        "failed": failed,
    }


def _latency(percent: int, output: str) -> float | None:
    found = re.search(rf"\b{percent}%\s+([\d.]+)(us|ms|s|m)\b", output)
    return float(found[1]) * {"us": 0.001, "ms": 1, "s": 1000, "m": 60_000}[found[2]] if found else None


def idle(reach: Reach, _: int) -> Figures:
    """Measure the memory and descriptors that each additional idle connection costs in the relay."""
    assert reach.relay is not None
    many = min(IDLE, descriptor_limit() // 5)
    with ExitStack() as visitors:
        _visit(visitors, reach.address, min(FEW, many))
        before = reach.relay.tree()
        memory, opened = resident(before), descriptors(before)
        _visit(visitors, reach.address, many)
        after = reach.relay.tree()
        return {
            "memory": (resident(after) - memory) / many / 1024,
            "descriptors": (descriptors(after) - opened) / many,
        }


def _visit(stack: ExitStack, address: Address, count: int) -> None:
    """Connect visitors, and wait until the relay is idle. The server's byte shows that each is connected end to end."""
    for _ in range(0, count, CROWD):
        visitors = [stack.enter_context(socket.create_connection(address, timeout=SILENCE)) for _ in range(CROWD)]
        if not all(visitor.recv(1) for visitor in visitors):
            raise BenchError("a visitor was refused")
    time.sleep(SETTLE)


LOADS = (
    Load(
        "bulk",
        (
            Measure("bulk", "one bulk stream", "Gbit/s", aims={"haproxy": 1.3, "ssh": 2.0}),
            Measure("cpu", "  processor time of both hops per GB", "ms", more_is_better=False),
        ),
        servers.bulk,
        bulk,
        warm_up=0,  # each stream has its ramp
    ),
    Load(
        "http1",
        (Measure("p50", "a lone small request, median", "ms", more_is_better=False),),
        servers.page,
        requests(1),
    ),
    *(
        Load(
            f"http{connections}",
            (
                Measure("rate", f"requests, {connections} conn.", "1/s", aims={"haproxy": 0.9, "ssh": 2.5}),
                Measure("p99", f"  their p99, {connections} conn.", "ms", more_is_better=False, aims={"haproxy": 1.3}),
                Measure("cpu", "  processor time of both hops, each", "µs", more_is_better=False),
            ),
            servers.page,
            requests(connections),
        )
        for connections in (64, 400)
    ),
    Load(
        "visitors",
        (
            Measure("rate", "new visitors, 32 at once", "1/s", aims={"haproxy": 0.7, "ssh": 1.2}),
            Measure("cpu", "  processor time of both hops, each", "µs", more_is_better=False),
        ),
        servers.page,
        requests(32, "Connection: close"),
    ),
    Load(
        "idle",
        (
            Measure("memory", "RSS per idle relay", "KiB", more_is_better=False, limit=5.0),
            Measure("descriptors", "descriptors per idle relay", "", more_is_better=False, limit=2.0),
        ),
        servers.greeter,
        idle,
        fresh=True,
    ),
)
