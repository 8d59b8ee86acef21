"""`python -m benchmarks.delay`: what a long way between relay and agent costs, beside plain TCP over the same way.

    relay 10.79.0.1 ── wire ── home 10.79.0.2         tunneld and visitors here, the agent and its servers there

Two network namespaces, and `benchmarks.wire` between them or, without a delay, a veth pair; so it wants root and Linux.
Plain TCP is a visitor who connects to the server over the wire; with webmux he connects to tunneld, and one carrier
crosses the wire. Small requests are measured alone and beside a bulk transfer: with webmux on the same carrier, with
TCP on connections of their own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from benchmarks.machines import Machine, connect, machines
from benchmarks.processes import BenchError, Crew, orphans_ended
from benchmarks.topologies import TLS_TOML, TUNNEL
from benchmarks.wire import ADDRESSES
from tunneld.tls.self_signed import make_self_signed

RELAY, HOME = ADDRESSES
CONTROL, CARRIERS, PUBLIC = 7010, 7012, 20080
DELAYS = (0.0, 20.0, 100.0)
TOML = f"""
[control]
host = "{RELAY}"
open_to_anyone = true
[http]
enabled = false
[tunnels]
host = "{RELAY}"
ports = "{PUBLIC}-{PUBLIC + 99}"
[webmux]
port = {CARRIERS}
"""
COLUMNS = {"plain": "plain TCP", "webmux": "webmux", "webmuxs": "webmux+TLS"}
SHARE, TIMES = 0.8, 3.0
"""The aims: of plain TCP's rate, for one stream; of its p99 alone, for a small request beside a bulk transfer."""
FEW, BROWSERS = 4, 50
PATIENCE = 120.0
"""Seconds for one visitor."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Seconds of a stream, and requests on each connection."""

    seconds: float
    requests: int


class World:
    """Two machines with a wire, and a server at home."""

    def __init__(self, crew: Crew, relay: Machine, home: Machine, milliseconds: float) -> None:
        self.relay, self.home = relay, home
        if milliseconds:
            wire = crew.start("wire", _python("benchmarks.wire", relay.name, home.name, str(milliseconds)))
            wire.line(lambda line: line.strip() == "ready" or None)
        else:
            connect(relay, RELAY, home, HOME)
        self.server = crew.start("server", home.command(*_python("benchmarks.hidden", "any", HOME))).line(int)
        self.address = (HOME, self.server)

    @contextmanager
    def reached(self, column: str) -> Iterator[None]:
        """While the block runs, visitors reach the server in this way."""
        if column == "plain":
            self.address = (HOME, self.server)
            yield
            return
        with Crew() as crew:
            text, where, trust = TOML, f"{RELAY}:{CONTROL}", []
            if column == "webmuxs":
                papers = make_self_signed(RELAY)
                certificate = crew.file("relay.pem", papers.certificate.decode())
                text += TLS_TOML.format(certificate=certificate, key=crew.file("relay.key", papers.key.decode()))
                where, trust = f"tls://{where}", ["--pin", papers.pin]
            config = crew.file("tunnel.toml", text)
            daemon = self.relay.command(*_python("tunneld", "--config", str(config), "--log-format", "json"))
            crew.start("tunneld", daemon).line(lambda line: json.loads(line)["event"] == "ready" or None)
            words = ["expose", f"{HOME}:{self.server}", "--relay", where, *trust, "--port", str(PUBLIC), "--quiet"]
            agent = crew.start("tunnel", self.home.command(sys.executable, "-c", TUNNEL, *words))
            agent.line(lambda line: line.startswith("tcp://") or None)
            self.address = (RELAY, PUBLIC)
            yield

    def visit(self, kind: str, *numbers: float) -> Any:
        """What somebody at the relay measures. Raises `BenchError`."""
        return _result(self.begin(kind, *numbers))

    def begin(self, kind: str, *numbers: float) -> subprocess.Popen[str]:
        """Somebody at the relay begins."""
        words = (kind, self.address[0], str(self.address[1]), *map(str, numbers))
        command = self.relay.command(*_python("benchmarks.visit", *words))
        return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def measure(world: World, delay: float, plan: Plan) -> dict[str, float]:
    """All figures of one column at one delay."""
    ramp = max(0.5, 30 * delay / 1000)  # a window that doubles with each round trip is open by then
    alone = world.visit("small", FEW, plan.requests)
    figures = {"p50": alone["p50"], "p99": alone["p99"]}
    figures["down"] = world.visit("bulk", ramp, plan.seconds)
    figures["up"] = world.visit("upload", ramp, plan.seconds)
    for name, kind in (("beside down", "bulk"), ("beside up", "upload")):
        transfer = world.begin(kind, 0, 3600)
        try:
            time.sleep(ramp)
            figures[name] = world.visit("small", FEW, plan.requests)["p99"]
        finally:
            transfer.kill()
            transfer.communicate()
    figures["browse"] = world.visit("browse", BROWSERS)
    return figures


def _result(process: subprocess.Popen[str]) -> Any:
    try:
        said, complaint = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise BenchError(f"a visitor was not done in {PATIENCE:g} s") from None
    if process.returncode:
        raise BenchError(f"a visitor failed: {complaint.strip().splitlines()[-1:]}")
    return json.loads(said)


ROWS = (
    ("down", "one stream down, Gbit/s"),
    ("up", "one stream up, Gbit/s"),
    ("p50", "a small request alone, median, ms"),
    ("p99", "  its p99"),
    ("beside down", "  its p99 beside a stream down"),
    ("beside up", "  its p99 beside a stream up"),
    ("browse", "50 browsers, 101 assets of 10 kB each, s"),
)


def rows(delay: float, columns: dict[str, dict[str, float]]) -> Iterator[str]:
    """The lines of the table for one delay; what an aim was for has its ratio beside it."""
    yield f"{f'round trip {delay:g} ms':<44}" + "".join(f"{title:>22}" for title in COLUMNS.values())
    for name, title in ROWS:
        cells = [_cell(name, columns[column], columns["plain"], column) for column in COLUMNS]
        yield f"{title:<44}" + "".join(f"{cell:>22}" for cell in cells)


def _cell(name: str, figures: dict[str, float], plain: dict[str, float], column: str) -> str:
    text = f"{figures[name]:.2f}"
    if name in ("down", "up") and column != "plain":
        ratio = figures[name] / plain[name]
        text += f" {ratio:.2f}×{'' if ratio >= SHARE else ' !'}"
    if name.startswith("beside"):
        ratio = figures[name] / figures["p99"]
        text += f" {ratio:.1f}×{'' if ratio <= TIMES or column == 'plain' else ' !'}"
    return text


def main() -> int:
    """Run it. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.delay", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--delay", type=float, action="append", metavar="MS", help="round trip; 0, 20 and 100 if not given"
    )
    parser.add_argument("--only", action="append", choices=list(COLUMNS)[1:], help="beside plain TCP")
    parser.add_argument("--seconds", type=float, default=3.0, metavar="N", help="of each stream (%(default)g)")
    parser.add_argument(
        "--requests", type=int, default=100, metavar="N", help=f"on each of {FEW} connections (%(default)s)"
    )
    options = parser.parse_args()
    wanted = [column for column in COLUMNS if not options.only or column in ("plain", *options.only)]
    for column in set(COLUMNS) - set(wanted):
        del COLUMNS[column]
    plan = Plan(options.seconds, options.requests)
    with orphans_ended():
        for delay in options.delay or DELAYS:
            with machines("relay", "home") as (relay, home), Crew() as crew:
                world, columns = World(crew, relay, home, delay), {}
                for column in wanted:
                    print(f"{delay:g} ms: {column} ...", file=sys.stderr, flush=True)
                    with world.reached(column):
                        columns[column] = measure(world, delay, plan)
                print("\n".join(rows(delay, columns)), flush=True)
    print(f"aims: a stream ≥ {SHARE:g} of plain TCP; p99 beside a stream ≤ {TIMES:g} × p99 alone; ! marks a miss")
    return 0


def _python(module: str, *words: str) -> list[str]:
    return [sys.executable, "-m", module, *words]


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BenchError as error:
        sys.exit(f"benchmarks: {error}")
