"""A small internet of network namespaces with wires between them, one of them behind a NAT.

    hidden 10.77.1.2 ── 10.77.1.1 nat 10.77.0.2 ── 10.77.0.1 relay 10.77.2.1 ── 10.77.2.2 visitor

The kernel must have network namespaces and veth, and this process must be allowed to make them (root); `masquerade`
and `drop` want nf_tables with nat and filter chains, `delay` wants sch_netem. Whatever is missing skips the test, and
says what. The programs `ip`, `nft` and `tc` are found by the fixture `program_path`.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

Find = Callable[[str], str]

LACKING = (
    "Operation not permitted",
    "Permission denied",
    "Operation not supported",
    "Unknown device type",
    "Protocol not supported",
    "No such file or directory",
    "qdisc kind is unknown",
    "Read-only file system",
)
"""Errors of the programs if the kernel lacks a feature or the test lacks permission; other errors are failures."""


class Namespace:
    """A machine, identified by the name of its namespace."""

    def __init__(self, find: Find, name: str) -> None:
        self.name = name
        self._find = find

    def command(self, *words: str) -> list[str]:
        """Return the command line that runs `words` on this machine."""
        return [self._find("ip"), "netns", "exec", self.name, *words]

    def must(self, *words: str) -> None:
        """Run a system program on this machine. Skips the test if the kernel or the permissions do not suffice."""
        program, *arguments = words
        _must(self.command(self._find(program), *arguments))

    def masquerade(self) -> None:
        """Forward packets, and replace source addresses by that of this machine (NAT)."""
        self.must("sysctl", "-qw", "net.ipv4.ip_forward=1")
        self.must("nft", "add table ip nat")
        self.must("nft", "add chain ip nat leave { type nat hook postrouting priority 100; }")
        self.must("nft", "add rule ip nat leave masquerade")

    @contextmanager
    def drop(self, rule: str) -> Iterator[None]:
        """Drop incoming packets that match `rule` (such as `tcp dport 7010`) for the length of the block."""
        self.must("nft", "add table inet drop")
        self.must("nft", "add chain inet drop come { type filter hook input priority 0; }")
        self.must("nft", f"add rule inet drop come {rule} drop")
        yield
        self.must("nft", "delete table inet drop")

    @contextmanager
    def delay(self, device: str, milliseconds: int) -> Iterator[None]:
        """Delay packets that leave through `device` for the length of the block."""
        self.must("tc", "qdisc", "add", "dev", device, "root", "netem", "delay", f"{milliseconds}ms")
        yield
        self.must("tc", "qdisc", "del", "dev", device, "root")


def _must(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    if done.returncode:
        complaint = f"this machine cannot `{' '.join(command[1:])}`: {done.stderr.strip()}"
        assert any(word in done.stderr for word in LACKING), complaint
        pytest.skip(complaint)


class Internet:
    """The machines of a test."""

    def __init__(self, find: Find) -> None:
        self._find = find
        self._prefix = f"tnl{os.getpid()}"
        self._wires = 0
        self.machines: list[Namespace] = []

    def machine(self, word: str) -> Namespace:
        """Add a machine without a network."""
        machine = Namespace(self._find, f"{self._prefix}-{word}")
        _must([self._find("ip"), "netns", "add", machine.name])
        self.machines.append(machine)
        machine.must("ip", "link", "set", "lo", "up")
        return machine

    def wire(self, one: Namespace, one_address: str, other: Namespace, other_address: str) -> tuple[str, str]:
        """Connect two machines with addresses of one /24; returns the names of the devices."""
        self._wires += 1
        names = f"w{self._wires}a", f"w{self._wires}b"
        peer = ("peer", "name", names[1], "netns", other.name)
        one.must("ip", "link", "add", names[0], "type", "veth", *peer)
        for machine, name, address in ((one, names[0], one_address), (other, names[1], other_address)):
            machine.must("ip", "address", "add", f"{address}/24", "dev", name)
            machine.must("ip", "link", "set", name, "up")
        return names

    def end(self) -> None:
        """Remove all machines and wires."""
        for machine in self.machines:
            subprocess.run([self._find("ip"), "netns", "delete", machine.name], check=False, timeout=20)


@contextmanager
def internet(find: Find) -> Iterator[Internet]:
    """Make an internet, and remove it when the block ends."""
    made = Internet(find)
    try:
        yield made
    finally:
        made.end()
