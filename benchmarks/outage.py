"""`python -m benchmarks.outage`: what visitors notice when the network or a program fails.

The relay has the configuration of `tunneld init`, with TLS and a credential (world.py). The machines are network
namespaces, so root and Linux are required. During each fault (faults.py) three things are observed:

    a visitor, ten times a second      back: seconds from the end of the fault (packets pass, the program was started)
                                       until a visitor that connected later was served
    `list`, five times a second        said ready: seconds in phase READY although no visitor was served
    an upload that began before        how it ended; bytes that were acknowledged but did not reach the server, which
                                       must be 0; bytes sent but not acknowledged, which are in doubt
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
"""Seconds until a tunnel must work again."""
REST = 2.0
"""Seconds before and after each fault, so that the next one finds the tunnel in normal operation."""


@dataclass(frozen=True, slots=True)
class Row:
    """The result of one fault."""

    back: float
    said_ready: float
    upload: Upload


def measure(world: World, fault: Fault) -> Row:
    """Cause a fault and measure its effect. Raises `BenchError`."""
    with world.watched() as watch, world.upload() as upload:
        time.sleep(REST)
        over = fault(world) or time.monotonic()
        time.sleep(REST)
        wait(RECOVER_WITHIN, world.serves)
        time.sleep(REST)
        seen = watch()
        return Row(seen.back_after(over), seen.ready_though_away, upload())


def line(name: str, rows: list[Row]) -> str:
    """Format a line of the table."""
    back = " ".join(f"{row.back:.1f}" for row in rows)
    ends = ", ".join(sorted({row.upload.end for row in rows}))
    lost, doubt = max(row.upload.lost for row in rows), max(row.upload.in_doubt for row in rows)
    ready = max(row.said_ready for row in rows)
    middle = median(row.back for row in rows)
    return (
        f"{name:<36}{middle:>7.1f}  {ready:>11.1f}  {ends:<12}{lost:>12}{doubt:>10}   {back if len(rows) > 1 else ''}"
    )


HEAD = f"{'':<36}{'back, s':>7}  {'said ready, s':>11}  {'an upload':<10}{'acked, lost':>12}{'in doubt':>10}   bytes"


def main() -> int:
    """Run the benchmark. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.outage", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--drop", type=float, action="append", metavar="SECONDS", help="may be repeated (default: 5, 30 and 90)"
    )
    parser.add_argument(
        "--stop", type=float, default=60.0, metavar="S", help="how long programs hang (default: %(default)g)"
    )
    parser.add_argument("--rounds", type=int, default=1, metavar="N", help="repetitions of each (default: %(default)s)")
    parser.add_argument("--backend", choices=("webmux", "tcp"), default="webmux", help="backend (default: %(default)s)")
    parser.add_argument("--only", action="append", metavar="WORDS", help="only faults with these words in their name")
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
                print(line(name, rows[name]), flush=True)
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
