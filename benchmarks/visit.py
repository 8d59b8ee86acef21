"""Visitors of `benchmarks.delay`, each a process that prints JSON: `python -m benchmarks.visit KIND HOST PORT ...`."""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from collections.abc import Callable
from statistics import quantiles

Address = tuple[str, int]
BUFFER = 1 << 20
SMALL = 512
"""Bytes of a small response."""
ASSET = 10_000
"""Bytes of one asset of a page."""
ASSETS = 100


def bulk(address: Address, ramp: float, seconds: float) -> float:
    """Measure one stream from the server in Gbit/s, after `ramp` seconds for its windows to open."""
    buffer = bytearray(BUFFER)
    with socket.create_connection(address, timeout=10) as client:
        client.sendall(b"b")

        def discard(until: float) -> int:
            size = 0
            while time.monotonic() < until:
                size += client.recv_into(buffer, BUFFER, socket.MSG_TRUNC)
            return size

        discard(time.monotonic() + ramp)
        start = time.monotonic()
        size = discard(start + seconds)
        return size * 8 / (time.monotonic() - start) / 1e9


def upload(address: Address, ramp: float, seconds: float) -> float:
    """Measure one stream to the server in Gbit/s, by the totals that the server reports."""
    with socket.create_connection(address, timeout=10) as client, client.makefile("rb") as totals:

        def send() -> None:
            block = bytes(BUFFER)
            client.sendall(b"s")
            try:
                while True:
                    client.sendall(block)
            except OSError:
                return

        def total(after: float) -> tuple[float, int]:
            while True:
                count = int.from_bytes(totals.read(8), "big")
                if (now := time.monotonic()) >= after:
                    return now, count

        threading.Thread(target=send, daemon=True).start()
        start, first = total(time.monotonic() + ramp)
        end, last = total(start + seconds)
        client.shutdown(socket.SHUT_RDWR)
        return (last - first) * 8 / (end - start) / 1e9


def small(address: Address, connections: float, requests: float) -> dict[str, float]:
    """Measure small requests, `requests` on each of `connections`: median and 99th percentile in milliseconds."""
    times: list[float] = []

    def ask() -> None:
        with socket.create_connection(address, timeout=20) as client, client.makefile("rb") as answers:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            client.sendall(b"a")
            for number in range(int(requests) + 1):
                start = time.monotonic()
                client.sendall(SMALL.to_bytes(4, "big"))
                answers.read(SMALL)
                if number:  # the first one includes the set-up of the connection
                    times.append(1000 * (time.monotonic() - start))

    _together(ask, int(connections))
    cuts = quantiles(times, n=100)
    return {"p50": cuts[49], "p99": cuts[98]}


def browse(address: Address, browsers: float) -> float:
    """Measure the seconds until all browsers have loaded a page, each over one connection: a request, then a hundred
    pipelined ones, as with HTTP/2.
    """

    def load() -> None:
        with socket.create_connection(address, timeout=60) as client, client.makefile("rb") as answers:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            client.sendall(b"a" + ASSET.to_bytes(4, "big"))
            if len(answers.read(ASSET)) != ASSET:
                raise EOFError
            client.sendall(ASSET.to_bytes(4, "big") * ASSETS)
            if len(answers.read(ASSET * ASSETS)) != ASSET * ASSETS:
                raise EOFError

    start = time.monotonic()
    _together(load, int(browsers))
    return time.monotonic() - start


def _together(what: Callable[[], None], count: int) -> None:
    failures: list[Exception] = []

    def one() -> None:
        try:
            what()
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=one) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


KINDS: dict[str, Callable[..., object]] = {"bulk": bulk, "upload": upload, "small": small, "browse": browse}

if __name__ == "__main__":
    kind, host, port, *numbers = sys.argv[1:]
    print(json.dumps(KINDS[kind]((host, int(port)), *map(float, numbers))), flush=True)
