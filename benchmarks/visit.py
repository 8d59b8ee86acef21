"""The visitors of `benchmarks.delay`, a process each: `python -m benchmarks.visit KIND HOST PORT ...`. Prints JSON."""

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
"""Octets of a small answer."""
ASSET = 10_000
"""Octets of one of a page's hundred assets."""
ASSETS = 100


def bulk(address: Address, ramp: float, seconds: float) -> float:
    """Gbit/s of one stream from the server, after its windows have opened."""
    buffer = bytearray(BUFFER)
    with socket.create_connection(address, timeout=10) as client:
        client.sendall(b"b")

        def discard(until: float) -> int:
            octets = 0
            while time.monotonic() < until:
                octets += client.recv_into(buffer, BUFFER, socket.MSG_TRUNC)
            return octets

        discard(time.monotonic() + ramp)
        start = time.monotonic()
        octets = discard(start + seconds)
        return octets * 8 / (time.monotonic() - start) / 1e9


def upload(address: Address, ramp: float, seconds: float) -> float:
    """Gbit/s of one stream to the server, as the server tells how much of it has arrived."""
    with socket.create_connection(address, timeout=10) as client, client.makefile("rb") as told:

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
                count = int.from_bytes(told.read(8), "big")
                if (now := time.monotonic()) >= after:
                    return now, count

        threading.Thread(target=send, daemon=True).start()
        start, first = total(time.monotonic() + ramp)
        end, last = total(start + seconds)
        client.shutdown(socket.SHUT_RDWR)
        return (last - first) * 8 / (end - start) / 1e9


def small(address: Address, connections: float, requests: float) -> dict[str, float]:
    """Median and 99th percentile, in milliseconds, of small requests: so many on each of so many connections."""
    times: list[float] = []

    def ask() -> None:
        with socket.create_connection(address, timeout=20) as client, client.makefile("rb") as answers:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            client.sendall(b"a")
            for number in range(int(requests) + 1):
                start = time.monotonic()
                client.sendall(SMALL.to_bytes(4, "big"))
                answers.read(SMALL)
                if number:  # the first one waits for the connection
                    times.append(1000 * (time.monotonic() - start))

    _together(ask, int(connections))
    cuts = quantiles(times, n=100)
    return {"p50": cuts[49], "p99": cuts[98]}


def browse(address: Address, browsers: float) -> float:
    """Seconds until so many browsers, a connection each, have a page: a request, then a hundred sent ahead (HTTP/2)."""

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
