"""Network namespaces that act as machines, for benchmarks of what happens between them. Root and Linux are required."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

from benchmarks.processes import BenchError, need

CONTROLS = ("cubic", "reno")
"""Congestion controls that do not pace with timers, see network.py; the first is not permitted everywhere."""


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine, identified by the name of its namespace."""

    name: str

    def command(self, *words: str) -> list[str]:
        """Return the command line that runs `words` on this machine."""
        return [need("ip"), "netns", "exec", self.name, *words]

    def must(self, program: str, *words: str) -> None:
        """Run a system program on this machine. Raises `BenchError`."""
        must(*self.command(need(program), *words))


@contextmanager
def machines(*words: str) -> Iterator[list[Machine]]:
    """Make machines without a network, and remove them when the block ends. Raises `BenchError`."""
    with ExitStack() as stack:
        made = []
        for word in words:
            machine = Machine(f"bench{os.getpid()}-{word}")
            must(need("ip"), "netns", "add", machine.name)
            stack.callback(must, need("ip"), "netns", "delete", machine.name)
            machine.must("ip", "link", "set", "lo", "up")
            for control in CONTROLS:
                with suppress(BenchError):
                    machine.must("sysctl", "-qw", f"net.ipv4.tcp_congestion_control={control}")
                    break
            made.append(machine)
        yield made


def connect(one: Machine, one_address: str, other: Machine, other_address: str) -> None:
    """Connect two machines, with addresses of one /24. Raises `BenchError`."""
    peer = ("peer", "name", "w", "netns", other.name)
    must(need("ip"), "-n", one.name, "link", "add", "w", "type", "veth", *peer)
    for machine, address in ((one, one_address), (other, other_address)):
        must(need("ip"), "-n", machine.name, "address", "add", f"{address}/24", "dev", "w")
        must(need("ip"), "-n", machine.name, "link", "set", "w", "up")


def must(*command: str) -> None:
    """Run a command. Raises `BenchError` if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    if done.returncode:
        raise BenchError(f"this machine cannot `{' '.join(command)}`: {done.stderr.strip()}")
