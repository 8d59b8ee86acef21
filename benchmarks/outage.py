"""`python -m benchmarks.outage`: what happens to a tunnel, and what visitors notice, over two machines of our own.

The relay is one that `tunneld init` wrote: TLS, a credential (world.py). The machines are network namespaces, so it
wants root and Linux. Three watch while something happens (faults.py):

    a visitor who tries ten times a second     back after: from when the fault is over (the packets pass, the program
                                               was started) until one who came later has his answer
    `list`, five times a second                said ready: for how long the phase was ready while no visitor was served
    an upload that was there before            how it ended; acknowledged octets that are not at the server, which would
                                               be lies; octets sent and not acknowledged, which it knows to be in doubt
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.faults import Fault, faults
from benchmarks.machines import machines
from benchmarks.processes import BenchError, orphans_ended
from benchmarks.world import Upload, World, wait

RECOVER_WITHIN = 60.0
"""Seconds after which we give up."""
REST = 2.0
"""Seconds before a fault and after it: the next one finds a tunnel at rest."""


@dataclass(frozen=True, slots=True)
class Row:
    """One fault, once."""

    back: float
    said_ready: float
    upload: Upload


def measure(world: World, fault: Fault) -> Row:
    """Let it happen. Raises `BenchError`."""
    with world.watched() as watch, world.upload() as upload:
        time.sleep(REST)
        over = fault(world) or time.monotonic()
        time.sleep(REST)
        wait(RECOVER_WITHIN, world.serves)
        time.sleep(REST)
        seen = watch()
        return Row(seen.back_after(over), seen.ready_though_away, upload())


def told(name: str, rows: list[Row]) -> str:
    """A line of the table."""
    back = " ".join(f"{row.back:.1f}" for row in rows)
    ends = ", ".join(sorted({row.upload.end for row in rows}))
    lost, doubt = max(row.upload.lost for row in rows), max(row.upload.in_doubt for row in rows)
    ready = max(row.said_ready for row in rows)
    middle = median(row.back for row in rows)
    return (
        f"{name:<36}{middle:>7.1f}  {ready:>11.1f}  {ends:<12}{lost:>12}{doubt:>10}   {back if len(rows) > 1 else ''}"
    )


HEAD = f"{'':<36}{'back, s':>7}  {'said ready, s':>11}  {'an upload':<10}{'acked, lost':>12}{'in doubt':>10}   octets"


def main() -> int:
    """Run it. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.outage", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--drop", type=float, action="append", metavar="SECONDS", help="5, 30 and 90 if not given")
    parser.add_argument("--stop", type=float, default=60.0, metavar="S", help="how long programs hang (%(default)g)")
    parser.add_argument("--rounds", type=int, default=1, metavar="N", help="how often each (%(default)s)")
    parser.add_argument("--backend", choices=("webmux", "tcp"), default="webmux", help="(%(default)s)")
    parser.add_argument("--only", action="append", metavar="WORDS", help="faults whose name has these words")
    options = parser.parse_args()
    every = faults(options.drop or [5.0, 30.0, 90.0], options.stop)
    chosen = {name: fault for name, fault in every.items() if any(word in name for word in options.only or [""])}
    rows: dict[str, list[Row]] = {}
    with ExitStack() as stack:
        stack.enter_context(orphans_ended())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="outage-")))
        world = World(folder, stack.enter_context(machines("relay", "home")), options.backend)
        stack.callback(world.end)
        try:
            world.begin()
            print(HEAD)
            for name, fault in chosen.items():
                print(f"{name} ...", file=sys.stderr, flush=True)
                rows[name] = [measure(world, fault) for _ in range(options.rounds)]
                print(told(name, rows[name]), flush=True)
        except BenchError:
            for log in folder.glob("*.log"):
                sys.stderr.write("".join(log.read_text().splitlines(keepends=True)[-40:]))
            raise
    print(f"median of all: {median(row.back for each in rows.values() for row in each):.1f} s")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BenchError as error:
        sys.exit(f"benchmarks: {error}")
