"""What one tenant can do to another: `python -m benchmarks.attacks` from the checkout prints one table in some minutes.

    bystander ──► relay ◄── agent ──► echo          an innocent tenant: a steady visitor, then short visits
    attacker  ──► relay                             another one, see attackers.py

Each attack has a fresh relay on loopback with its default limits and two ordinary credentials. The row has the latency
of the steady visitor, the number of short visits per second, and whether other requesters are still served; in each
pair the first figure is from before the attack. Attackers yield the processor to the relay (nice): on a real network
they have a machine of their own.

The columns `turn` are the processor time of the relay's turns during the attack, see turns.py: what the relay itself
adds to a latency, on a busy machine, too. If the relay or the agent ends, or the bystander's port refuses visitors,
their logs follow the row.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from base64 import b64encode
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import quantiles

import trio

from benchmarks.attackers import KINDS
from benchmarks.turns import Turns
from tests.support.credentials import SECRET
from tests.support.exposed import agent_of
from tests.support.programs import Daemon, daemon, program
from tunneld import client
from tunneld.net.endpoint import Endpoint
from tunneld.wire.verifier import MIN_ITERATIONS, derive

SECONDS = 3.0
"""Length of each measurement."""
PAUSE = 0.002
"""Seconds between two requests of the steady visitor."""
AT_ONCE = 8
"""Short visits at the same time."""
READY_TIMEOUT = 90.0
PATIENCE = 5.0
"""Seconds after which a requester counts as locked out."""
CREDENTIALS = {"home": "user", "mallory": "user", "root": "admin"}


@dataclass
class Tenants:
    """A relay, and the bystander's agent at it."""

    relay: Daemon
    turns: Turns
    agent: trio.Process
    agent_log: Path
    public: Endpoint
    broken: list[str] = field(default_factory=list)  # errors of visitors

    def report(self) -> str:
        """What ended or broke, with both logs; empty if nothing did."""
        ended = {"relay": self.relay.process.poll(), "agent": self.agent.poll()}
        problems = [f"the {name} ended: {status}" for name, status in ended.items() if status is not None]
        problems += [f"{number} visitors: {error}" for error, number in Counter(self.broken).items()]
        if not problems:
            return ""
        relay = "".join(f"  relay: {json.dumps(line)}\n" for line in self.relay.log)
        agent = "".join(f"  agent: {line}\n" for line in self.agent_log.read_text().splitlines())
        return "".join(f"  {problem}\n" for problem in problems) + relay + agent


@dataclass
class Sample:
    """One measurement of the bystander."""

    median: float  # milliseconds
    p99: float
    visits: float  # per second

    @classmethod
    async def of(cls, tenants: Tenants) -> Sample:
        """Measure the steady visitor, then short visits."""
        times = await steady(tenants)
        cuts = quantiles(times, n=100) if len(times) > 1 else [1000 * SECONDS] * 99
        return cls(cuts[49], cuts[98], await visits(tenants))


async def steady(tenants: Tenants) -> list[float]:
    """One visitor that sends a byte and waits for its echo, repeatedly. Returns the times in milliseconds."""
    times: list[float] = []
    with trio.move_on_after(SECONDS), reported(tenants):
        public = tenants.public
        async with await trio.open_tcp_stream(public.host, public.port) as stream:
            while True:
                began = time.perf_counter()
                await stream.send_all(b"x")
                await stream.receive_some()
                times.append(1000 * (time.perf_counter() - began))
                await trio.sleep(PAUSE)
    return times


@contextmanager
def reported(tenants: Tenants) -> Iterator[None]:
    """A visitor that is refused or broken off does not end the benchmark; the report shows it."""
    try:
        yield
    except (OSError, trio.BrokenResourceError) as error:
        tenants.broken.append(repr(error.__cause__ or error))


async def visits(tenants: Tenants) -> float:
    """Connect, send a byte, receive it and disconnect, repeatedly. Returns the number of visits per second."""
    count = 0

    async def visit() -> None:
        nonlocal count
        public = tenants.public
        while True:
            await trio.lowlevel.checkpoint()
            with reported(tenants):
                async with await trio.open_tcp_stream(public.host, public.port) as stream:
                    await stream.send_all(b"x")
                    count += bool(await stream.receive_some())

    with trio.move_on_after(SECONDS):
        async with trio.open_nursery() as nursery:
            for _ in range(AT_ONCE):
                nursery.start_soon(visit)
    return count / SECONDS


async def echo(stream: trio.SocketStream) -> None:
    """The bystander's local server."""
    with suppress(trio.BrokenResourceError):
        async for data in stream:
            await stream.send_all(data)


async def locked_out(relay: Daemon) -> str:
    """Which requesters are not served now: the other tenant, the admin, a health probe."""
    return " ".join([name for name in ("home", "root") if not await logs_in(relay, name)] + await failed_probes(relay))


async def logs_in(relay: Daemon, name: str) -> bool:
    """Whether a credential can log in and ask for its tunnels."""
    with trio.move_on_after(PATIENCE), suppress(Exception):
        async with client.connect(relay.control, credential=(name, SECRET)) as requester:
            await requester.list()
            return True
    return False


async def failed_probes(relay: Daemon) -> list[str]:
    """`healthz` unless it answers, and `metrics` unless the admin gets it."""
    http = Endpoint.parse(relay.http.replace("http://", "tcp://").rstrip("/"))
    authorization = f"Authorization: Basic {b64encode(f'root:{SECRET}'.encode()).decode()}\r\n"
    failed = []
    for name, header in (("healthz", ""), ("metrics", authorization)):
        answer = b""
        with trio.move_on_after(PATIENCE), suppress(OSError, trio.BrokenResourceError):
            async with await trio.open_tcp_stream(http.host, http.port) as stream:
                await stream.send_all(f"GET /{name} HTTP/1.1\r\nHost: localhost\r\n{header}\r\n".encode())
                answer = await stream.receive_some()
        failed += [] if b" 200 " in answer else [name]
    return failed


@asynccontextmanager
async def open_tenants(folder: Path) -> AsyncIterator[Tenants]:
    """A relay with credentials, and the bystander's tunnel."""
    words = '\n[ssh]\nenabled = true\nport = 0\nhost = "127.0.0.1"\n'
    for name, role in CREDENTIALS.items():
        proof = derive(SECRET, b"salt", MIN_ITERATIONS).reveal()
        words += f'\n[[credential]]\nname = "{name}"\nrole = "{role}"\nverifier = "{proof}"\n'
    secret = folder / "secret"
    secret.write_text(SECRET)
    secret.chmod(0o600)
    turns, agent_log = Turns(folder / "turns"), folder / "agent.log"
    async with daemon(folder, words=words, how=turns.command) as relay, trio.open_nursery() as nursery:
        (listener,) = await nursery.start(partial(trio.serve_tcp, echo, 0, host="127.0.0.1"))
        port = listener.socket.getsockname()[1]
        where = ["--relay", relay.control, "--credential", "home", "--secret-file", str(secret), "--backend", "webmux"]
        with agent_log.open("wb") as log:
            async with agent_of(f"127.0.0.1:{port}", *where, stderr=log) as (agent, public):
                await until_served(public)
                yield Tenants(relay, turns, agent, agent_log, public)
        nursery.cancel_scope.cancel()


async def until_served(public: Endpoint) -> None:
    """Wait for the first echo."""
    with trio.fail_after(READY_TIMEOUT):
        async with await trio.open_tcp_stream(public.host, public.port) as stream:
            await stream.send_all(b"x")
            await stream.receive_some()


async def run_attack(kind: str) -> str:
    """Measure before and during one attack; returns its row."""
    with tempfile.TemporaryDirectory() as name:
        async with open_tenants(Path(name)) as tenants:
            before = await Sample.of(tenants)
            ports = {"control": tenants.relay.control, "http": tenants.relay.http}
            command = [sys.executable, "-m", "benchmarks.attackers", kind, json.dumps(ports)]
            async with program(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as attacker:
                assert attacker.stdout is not None
                with trio.move_on_after(READY_TIMEOUT):
                    await attacker.stdout.receive_some()
                tenants.turns.begin()
                during = await Sample.of(tenants)
                turns = [tenants.turns.percentile(part) for part in (0.99, 1)]
                refused = await locked_out(tenants.relay)
                over = " (it ended)" if attacker.poll() is not None else ""
            report = tenants.report()
    return (
        f"{kind:18}{before.median:8.2f}{during.median:9.2f}{before.p99:9.2f}{during.p99:9.1f}"
        f"{before.visits:9.0f}{during.visits:8.0f}{turns[0]:10.1f}{turns[1]:8.1f}   {refused or '-'}{over}\n{report}"
    ).rstrip()


def main() -> int:
    """Print the table, each row when it is complete."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attacks", description="Attack one tenant by another.")
    parser.add_argument("--only", action="append", choices=KINDS, help="run only this attack; may be repeated")
    print(f"{'':18}{'p50, ms':>17}{'p99, ms':>18}{'visits/s':>17}{'turn p99, max, ms':>18}   locked out", flush=True)
    for kind in parser.parse_args().only or KINDS:
        print(trio.run(run_attack, kind), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
