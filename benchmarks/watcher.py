"""What a visitor and `list` say of a tunnel: `python -m benchmarks.watcher RELAY PIN HOST PORT`, until SIGTERM.

A visitor tries ten times a second and has half a second each time: what a person sees who presses reload. Five times a
second the relay is asked for the tunnel's phase. At the end it prints what it has seen as JSON, with the times of a
clock that all programs of this machine share.
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

EVERY, WITHIN = 0.1, 0.5
LOOK = 0.2
NAME = "web"


async def probe(host: str, port: int, seen: list[tuple[float, float, bool]]) -> None:
    """Visit for ever; `seen` gets when each visit began and ended, and whether it was served."""
    while True:
        began, served = time.monotonic(), False
        with trio.move_on_after(WITHIN), suppress(OSError, trio.BrokenResourceError):
            async with await trio.open_tcp_stream(host, port) as visitor:
                await visitor.send_all(b"p")
                served = await visitor.receive_some(1) == b"P"
        seen.append((began, time.monotonic(), served))
        await trio.sleep(max(began + EVERY - time.monotonic(), 0))


async def look(relay: str, pin: str, seen: list[tuple[float, str]]) -> None:
    """Ask for the phase for ever; `seen` gets when and what, which is empty where nobody answers."""
    credential = ("agent", os.environ["TUNNEL_SECRET"])
    while True:
        with suppress(TunneldError):
            async with connect(relay, tls=client_tls_context(pin=pin), credential=credential, timeout=1) as client:
                while True:
                    phases = [record["phase"] for record in await client.list() if record.get("name") == NAME]
                    seen.append((time.monotonic(), ",".join(phases)))
                    await trio.sleep(LOOK)
        seen.append((time.monotonic(), ""))
        await trio.sleep(LOOK)


async def main(relay: str, pin: str, host: str, port: str) -> None:
    """Watch until told to stop."""
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
    """What was seen, read again."""

    def __init__(self, said: str) -> None:
        record = json.loads(said)
        self.visits: list[tuple[float, float, bool]] = record["visits"]
        self.phases: list[tuple[float, str]] = record["phases"]

    def back_after(self, over: float) -> float:
        """Seconds from then until a visitor who came later had his answer. Raises `BenchError`."""
        for began, ended, served in self.visits:
            if served and began >= over:
                return ended - over
        raise BenchError("no visitor was served again")

    @property
    def away(self) -> float:
        """Seconds between visits that were not served."""
        pairs = zip(self.visits, self.visits[1:], strict=False)
        return sum(other[0] - one[0] for one, other in pairs if not one[2])

    @property
    def ready_though_away(self) -> float:
        """Seconds for which the relay said ready, while neither the visit before nor the one after was served.

        Raises `BenchError` where it never said so: then nobody has looked.
        """
        if not any(phase == "ready" for _, phase in self.phases):
            raise BenchError("the relay never said that the tunnel is ready")
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
