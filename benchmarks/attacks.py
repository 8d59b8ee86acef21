"""What one tenant can do to another: `python -m benchmarks.attacks` from the checkout prints one table in some minutes.

    bystander ──► relay ◄── agent ──► echo          an innocent tenant: a steady visitor, then short visits
    attacker  ──► relay                             another one, see attackers.py

Each attack has a fresh relay on loopback with its default limits and two ordinary credentials. The row has the latency
of the steady visitor, the number of short visits per second, and whether other requesters are still served; in each
pair the first figure is from before the attack. Attackers yield the processor to the relay (nice): on a real network
they have a machine of their own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from base64 import b64encode
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import quantiles

import trio

from benchmarks.attackers import KINDS
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
class Sample:
    """One measurement of the bystander."""

    median: float  # milliseconds
    p99: float
    visits: float  # per second

    @classmethod
    async def of(cls, public: Endpoint) -> Sample:
        """Measure the steady visitor, then short visits."""
        times = await steady(public)
        cuts = quantiles(times, n=100) if len(times) > 1 else [1000 * SECONDS] * 99
        return cls(cuts[49], cuts[98], await visits(public))


async def steady(public: Endpoint) -> list[float]:
    """One visitor that sends a byte and waits for its echo, repeatedly. Returns the times in milliseconds."""
    times: list[float] = []
    with trio.move_on_after(SECONDS):
        async with await trio.open_tcp_stream(public.host, public.port) as stream:
            while True:
                began = time.perf_counter()
                await stream.send_all(b"x")
                await stream.receive_some()
                times.append(1000 * (time.perf_counter() - began))
                await trio.sleep(PAUSE)
    return times


async def visits(public: Endpoint) -> float:
    """Connect, send a byte, receive it and disconnect, repeatedly. Returns the number of visits per second."""
    count = 0

    async def visit() -> None:
        nonlocal count
        while True:
            with suppress(OSError, trio.BrokenResourceError):
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
async def tenants(folder: Path) -> AsyncIterator[tuple[Daemon, Endpoint]]:
    """A relay with credentials, and the bystander's tunnel; yields the relay and the tunnel's public address."""
    words = '\n[ssh]\nenabled = true\nport = 0\nhost = "127.0.0.1"\n'
    for name, role in CREDENTIALS.items():
        proof = derive(SECRET, b"salt", MIN_ITERATIONS).reveal()
        words += f'\n[[credential]]\nname = "{name}"\nrole = "{role}"\nverifier = "{proof}"\n'
    secret = folder / "secret"
    secret.write_text(SECRET)
    secret.chmod(0o600)
    async with daemon(folder, words=words) as relay, trio.open_nursery() as nursery:
        (listener,) = await nursery.start(partial(trio.serve_tcp, echo, 0, host="127.0.0.1"))
        port = listener.socket.getsockname()[1]
        where = ["--relay", relay.control, "--credential", "home", "--secret-file", str(secret), "--backend", "webmux"]
        async with agent_of(f"127.0.0.1:{port}", *where, "--quiet") as (_, public):
            await until_served(public)
            yield relay, public
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
        async with tenants(Path(name)) as (relay, public):
            before = await Sample.of(public)
            ports = {"control": relay.control, "http": relay.http}
            command = [sys.executable, "-m", "benchmarks.attackers", kind, json.dumps(ports)]
            async with program(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as attacker:
                assert attacker.stdout is not None
                with trio.move_on_after(READY_TIMEOUT):
                    await attacker.stdout.receive_some()
                during = await Sample.of(public)
                refused = await locked_out(relay)
                over = " (it ended)" if attacker.poll() is not None else ""
    return (
        f"{kind:18}{before.median:8.2f}{during.median:9.2f}{before.p99:9.2f}{during.p99:9.1f}"
        f"{before.visits:9.0f}{during.visits:8.0f}   {refused or '-'}{over}"
    )


def main() -> int:
    """Print the table, each row when it is complete."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attacks", description="Attack one tenant by another.")
    parser.add_argument("--only", action="append", choices=KINDS, help="run only this attack; may be repeated")
    print(f"{'':18}{'p50, ms':>17}{'p99, ms':>18}{'visits/s':>17}   locked out", flush=True)
    for kind in parser.parse_args().only or KINDS:
        print(trio.run(run_attack, kind), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
