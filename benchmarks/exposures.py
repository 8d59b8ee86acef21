"""`python -m benchmarks.exposures`: `tunnel up` with hundreds of exposures, at its start and after a kill of the relay.

The relay has TLS, a credential and its reservations on disk. It is reached at an address that is not loopback where the
system permits a network namespace, so its limit of unauthenticated connections per source applies. The numbers:

    ready        seconds from the start of the agent until the last exposure has its tunnel and a connection that waits
                 for visitors
    back         the same from the start of another relay, after the first one was killed with SIGKILL
    connections  control connections of the agent, as the relay sees them, and those for visitors: carriers, or parked
                 ones
    memory       MiB of the relay and the agent (resident)
    CPU          seconds of the relay's and the agent's processor time for that; they count on a busy machine, too
    refused      connections that a relay refused, in its log; must be 0
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from contextlib import AbstractAsyncContextManager, suppress
from pathlib import Path

import trio

from benchmarks.network import own_network
from benchmarks.processes import BenchError, Child, Crew, descriptor_limit, find, orphans_ended
from benchmarks.topologies import TLS_TOML, TUNNEL, TUNNELD
from tunneld.client import Client, connect
from tunneld.errors import TunneldError
from tunneld.tls.contexts import client_tls_context
from tunneld.tls.self_signed import make_self_signed
from tunneld.wire.verifier import derive

PRIVATE = "10.78.0.1"
ADDRESS = "127.0.0.2"
"""Where there is no network namespace: loopback, without a limit per source."""
CONTROL, CARRIERS = 17010, 17012
WITHIN = 120.0
"""Seconds for all exposures to be ready; the aim is 10."""

RELAY_TOML = """
[control]
host = "{host}"
port = {control}
[http]
enabled = false
[tunnels]
host = "{host}"
[webmux]
host = "{host}"
port = {carriers}
[daemon]
state = "state"
[[credential]]
name = "agent"
verifier = "{verifier}"
"""

EXPOSE_TOML = """
[relay]
where = "tls://{host}:{control}"
pin = "{pin}"
credential = "agent"
secret_file = "secret"
"""


class Machine:
    """A relay that can be killed, and an agent with many exposures."""

    def __init__(self, crew: Crew, host: str, count: int, backend: str) -> None:
        self._crew, self._host, self._count = crew, host, count
        self._secret, self._relays = secrets.token_urlsafe(), list[Child]()
        self._agent: Child
        made = make_self_signed(host)
        self._tls = client_tls_context(pin=made.pin)
        tls = TLS_TOML.format(
            certificate=crew.file("relay.pem", made.certificate.decode()), key=crew.file("relay.key", made.key.decode())
        )
        verifier = derive(self._secret, secrets.token_bytes(16)).reveal()
        text = RELAY_TOML.format(host=host, control=CONTROL, carriers=CARRIERS, verifier=verifier)
        self._config = crew.file("tunnel.toml", text + tls)
        crew.file("secret", self._secret).chmod(0o600)
        tables = "".join(f'[expose.e{n}]\ntarget = 9\nbackend = "{backend}"\npool = 2\n' for n in range(count))
        top = EXPOSE_TOML.format(host=host, control=CONTROL, pin=made.pin)
        self._file = crew.file("expose.toml", top + tables)

    def start_relay(self) -> None:
        """Start a relay, and wait until it listens."""
        options: list[str | Path] = ["--config", self._config, "--log-format", "json"]
        command = [sys.executable, "-P", "-c", TUNNELD, *options]
        self._relays.append(self._crew.start(f"relay{len(self._relays)}", command))
        self._relays[-1].line(lambda line: json.loads(line)["event"] == "ready" or None)

    def kill_relay(self) -> None:
        """Kill the relay, as the kernel does when memory has run out."""
        os.kill(self._relays[-1].process.pid, signal.SIGKILL)
        self._relays[-1].process.wait()

    def start_agent(self) -> None:
        """Start `tunnel up`."""
        command: list[str | Path] = [sys.executable, "-P", "-c", TUNNEL, "up", "--file", self._file, "--json"]
        self._agent = self._crew.start("agent", command)

    @property
    def processor_times(self) -> tuple[float, float]:
        """Seconds of the present relay and of the agent."""
        return processor_time(self._relays[-1].process.pid), processor_time(self._agent.process.pid)

    async def until_ready(self) -> tuple[float, int]:
        """Wait until every exposure is ready; returns the seconds, and the number of control connections."""
        began = time.monotonic()
        with trio.move_on_after(WITHIN):
            while True:
                with suppress(TunneldError):
                    async with self._connect() as client:
                        return await self._watch(client, began)
                await trio.sleep(0.05)
        raise BenchError(f"not all of {self._count} exposures were ready within {WITHIN:g} s")

    def _connect(self) -> AbstractAsyncContextManager[Client]:
        return connect(f"tls://{self._host}:{CONTROL}", tls=self._tls, credential=("agent", self._secret))

    async def _watch(self, client: Client, began: float) -> tuple[float, int]:
        while True:
            tunnels = await client.list()
            ready = [tunnel for tunnel in tunnels if tunnel["phase"] == "ready"]
            if len(ready) == self._count:
                return time.monotonic() - began, len({tunnel["owner"] for tunnel in tunnels})
            await trio.sleep(0.2)

    @property
    def memory(self) -> str:
        """MiB of the present relay and of the agent."""
        relay, agent = (resident(child.process.pid) for child in (self._relays[-1], self._agent))
        return f"memory {relay:.0f} MiB of the relay and {agent:.0f} MiB of the agent"

    @property
    def refused(self) -> int:
        """Lines about refused connections in the logs of all relays."""
        lines = [line for relay in self._relays for line in relay.output.read_text().splitlines()]
        return sum("refused" in json.loads(line).get("event", "") for line in lines if line.startswith("{"))


def processor_time(pid: int) -> float:
    """Seconds that a process has run, in user and kernel mode."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident(pid: int) -> float:
    """MiB of a process that are in memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def established(host: str, besides: int) -> int:
    """TCP connections to ports of the relay in this network, without those to the port `besides`."""
    address = socket.inet_aton(host)[::-1].hex().upper()
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    local = [fields[1].partition(":") for fields in lines if fields[3] == "01"]
    listening = {fields[1].partition(":")[2] for fields in lines if fields[3] == "0A"} - {f"{besides:04X}"}
    return sum(host == address and port in listening for host, _, port in local)


def private_address() -> str:
    """An address of this process's own network namespace that is not loopback; `ADDRESS` where there is none."""
    if not own_network() or (ip := find("ip")) is None:
        return ADDRESS
    done = subprocess.run([ip, "address", "add", f"{PRIVATE}/32", "dev", "lo"], capture_output=True, check=False)
    return PRIVATE if done.returncode == 0 else ADDRESS


def main() -> int:
    """Run the benchmark. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.exposures", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--count", type=int, default=500, metavar="N", help="exposures (default: %(default)s)")
    parser.add_argument("--backend", choices=("webmux", "tcp"), default="webmux", help="backend (default: %(default)s)")
    options = parser.parse_args()
    descriptor_limit()
    host = private_address()
    with orphans_ended(), Crew() as crew:
        machine = Machine(crew, host, options.count, options.backend)
        machine.start_relay()
        machine.start_agent()
        ready, connections = trio.run(machine.until_ready)
        print(f"{options.count} exposures at {host}, {options.backend} in TLS")
        relay, agent = machine.processor_times
        cpu = f"CPU {relay:.1f} s of the relay and {agent:.1f} s of the agent"
        counted = f"control connections: {connections}, for visitors: {established(host, CONTROL)}"
        print(f"ready after {ready:.1f} s, {cpu}, {machine.memory}, {counted}")
        machine.kill_relay()
        machine.start_relay()
        back, connections = trio.run(machine.until_ready)
        relay, agent = machine.processor_times[0], machine.processor_times[1] - agent
        cpu = f"CPU {relay:.1f} s of the relay and {agent:.1f} s of the agent"
        counted = f"control connections: {connections}, for visitors: {established(host, CONTROL)}"
        print(f"back after {back:.1f} s, {cpu}, {machine.memory}, {counted}, refused: {machine.refused}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BenchError as error:
        sys.exit(f"benchmarks: {error}")
