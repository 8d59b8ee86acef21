"""`python -m benchmarks`: compare tunneld with every peer found on PATH, in one run and one table."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import aims
from benchmarks.loads import LOADS, Load
from benchmarks.network import own_network
from benchmarks.processes import BenchError, descriptor_limit, orphans_ended
from benchmarks.run import Bench, Plan, Results
from benchmarks.table import LEGEND, Table
from benchmarks.topologies import TOPOLOGIES, Topology
from benchmarks.versions import machine, versions

THOROUGH = Plan(seconds=3, rounds=3, budget=600.0)  # with all peers, eleven minutes from start to end
QUICK = Plan(seconds=1, rounds=2, budget=170.0)  # three minutes


def main() -> int:
    """Run the benchmark. Returns the exit status, which is 0 even if a target was missed."""
    options = parser().parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    try:
        with orphans_ended():
            return _main(options)
    except KeyboardInterrupt:
        print("\nbenchmarks: interrupted", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    """Make the parser."""
    made = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").partition("\n")[0])
    names = [load.name for load in LOADS] + [topology.name for topology in TOPOLOGIES]
    made.add_argument("--quick", action="store_true", help="take fewer and shorter samples: about three minutes")
    made.add_argument("--only", action="append", default=[], metavar="NAME", choices=names, help=_only_help())
    made.add_argument("--seconds", type=_positive, metavar="N", help="length of a sample")
    made.add_argument("--rounds", type=_positive, metavar="N", help="number of samples")
    made.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    made.add_argument("--json", type=Path, metavar="FILE", help="write all samples to a file")
    return made


def _main(options: argparse.Namespace) -> int:
    descriptor_limit()
    results = Results()
    loads, topologies = _chosen(options.only, results)
    if not own_network():
        results.notes.append(
            "no permission for a network namespace: measured in the machine's network with its settings and traffic"
        )
    where, found = machine(), versions()
    start = time.monotonic()
    plan = _plan(options)
    Bench(topologies, plan, results, lambda text: print(text, file=sys.stderr)).run(loads)
    table = Table(results, loads, topologies)
    print(table.markdown() if options.markdown else table.text())
    print(f"\n{LEGEND}\n")
    if lines := list(aims.told(results)):
        print("\n".join(["targets for webmux and ssh:", *(f"  {line}" for line in lines), ""]))
    print(f"{plan.rounds} × {plan.seconds} s, {time.monotonic() - start:.0f} s in all, on loopback: " + _listed(where))
    print("versions: " + _listed(found))
    for note in results.notes:
        print(f"note: {note}")
    if options.json:
        record = {"machine": where, "versions": found, "samples": results.samples, "notes": results.notes}
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


def _chosen(only: Sequence[str], results: Results) -> tuple[list[Load], list[Topology]]:
    """Return the loads and topologies to run: those in `only` (default: all) that can run here."""
    loads = [load for load in LOADS if load.name in only] or list(LOADS)
    topologies = [topology for topology in TOPOLOGIES if topology.name in only] or list(TOPOLOGIES)
    for topology in list(topologies):
        if missing := topology.missing():
            results.notes.append(f"{topology.title}: skipped, not on PATH: {', '.join(missing)}")
            topologies.remove(topology)
    return loads, topologies


def _plan(options: argparse.Namespace) -> Plan:
    plan = QUICK if options.quick else THOROUGH
    seconds, rounds = options.seconds or plan.seconds, options.rounds or plan.rounds
    longer = seconds * rounds / (plan.seconds * plan.rounds)  # more samples extend the time budget
    return Plan(seconds, rounds, plan.budget * max(1.0, longer))


def _only_help() -> str:
    loads = ", ".join(load.name for load in LOADS)
    topologies = ", ".join(topology.name for topology in TOPOLOGIES)
    return f"only this load ({loads}) or topology ({topologies}); may be repeated"


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _listed(facts: dict[str, str] | dict[str, str | int | float]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def _interrupt(*_: object) -> None:
    """Interrupt the run, and ignore further signals while the programs are being stopped."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BenchError as error:
        sys.exit(f"benchmarks: {error}")
