"""Observe a tunnel until SIGTERM: `python -m benchmarks.watcher RELAY PIN HOST PORT`.

A visitor connects ten times a second and waits half a second each time, like a user who reloads a page. Five times a
second the relay is asked for the phase of the tunnel. At the end the observations are printed as JSON, with times of a
clock that all programs of the machine share.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from contextlib import suppress

import trio

from benchmarks.processes import BenchError
from tunneld.client import connect
from tunneld.errors import TunneldError
from tunneld.tls.contexts import client_tls_context

VISIT_INTERVAL, VISIT_TIMEOUT = 0.1, 0.5
LIST_INTERVAL = 0.2
NAME = "web"


async def probe(host: str, port: int, seen: list[tuple[float, float, bool]]) -> None:
    """Visit until cancelled. Appends the begin and end of each visit, and whether it was served, to `seen`."""
    while True:
        began, served = time.monotonic(), False
        with trio.move_on_after(VISIT_TIMEOUT), suppress(OSError, trio.BrokenResourceError):
            async with await trio.open_tcp_stream(host, port) as visitor:
                await visitor.send_all(b"p")
                served = await visitor.receive_some(1) == b"P"
        seen.append((began, time.monotonic(), served))
        await trio.sleep(max(began + VISIT_INTERVAL - time.monotonic(), 0))


async def look(relay: str, pin: str, seen: list[tuple[float, str]]) -> None:
    """Ask for the phase until cancelled. Appends the time and the phase, empty without an answer, to `seen`."""
    credential = ("agent", os.environ["TUNNEL_SECRET"])
    while True:
        with suppress(TunneldError):
            async with connect(relay, tls=client_tls_context(pin=pin), credential=credential, timeout=1) as client:
                while True:
                    phases = [record["phase"] for record in await client.list() if record.get("name") == NAME]
                    seen.append((time.monotonic(), ",".join(phases)))
                    await trio.sleep(LIST_INTERVAL)
        seen.append((time.monotonic(), ""))
        await trio.sleep(LIST_INTERVAL)


async def main(relay: str, pin: str, host: str, port: str) -> None:
    """Observe until SIGTERM."""
    visits: list[tuple[float, float, bool]] = []
    phases: list[tuple[float, str]] = []
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(probe, host, int(port), visits)
            nursery.start_soon(look, relay, pin, phases)
            async for _ in signals:
                break
            nursery.cancel_scope.cancel()
    print(json.dumps({"visits": visits, "phases": phases}))


class Seen:
    """The observations of one run."""

    def __init__(self, output: str) -> None:
        record = json.loads(output)
        self.visits: list[tuple[float, float, bool]] = record["visits"]
        self.phases: list[tuple[float, str]] = record["phases"]

    def back_after(self, over: float) -> float:
        """Seconds from `over` until a visitor that connected later was served. Raises `BenchError`."""
        for began, ended, served in self.visits:
            if served and began >= over:
                return ended - over
        raise BenchError("no visitor was served again")

    @property
    def away(self) -> float:
        """Seconds during which visits were not served."""
        pairs = zip(self.visits, self.visits[1:], strict=False)
        return sum(other[0] - one[0] for one, other in pairs if not one[2])

    @property
    def ready_though_away(self) -> float:
        """Seconds in phase READY while neither the visit before nor the one after was served.

        Raises `BenchError` if the phase was never READY, since then nothing was observed.
        """
        if not any(phase == "ready" for _, phase in self.phases):
            raise BenchError("the relay never reported that the tunnel is ready")
        seconds = 0.0
        for (then, phase), (later, _) in zip(self.phases, self.phases[1:], strict=False):
            before = [served for _, ended, served in self.visits if ended <= then]
            after = [served for began, _, served in self.visits if began >= later]
            if phase == "ready" and before and after and not before[-1] and not after[0]:
                seconds += later - then
        return seconds


if __name__ == "__main__":
    relay, pin, host, port = sys.argv[1:]
    trio.run(main, relay, pin, host, port)
