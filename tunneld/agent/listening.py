"""Whether anything listens where visitors are to go, seen without knocking there: `nc -l` takes one connection in its
life. Linux tells it in /proc/net/tcp (proc_pid_net(5)); elsewhere, and of other machines, nothing is known.
"""

from __future__ import annotations

import ipaddress
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import wrap

from tunneld.endpoint import Target, is_loopback, join_host_port

TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
LISTEN = "0A"
"""TCP_LISTEN, as the tables have it."""

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def complaint(target: Target) -> str | None:
    """That nothing listens at the target, in words; None where something does, or nobody can tell. Reads files."""
    if target.path:
        there = Path(target.path).is_socket()
        return None if there else f"no socket is at {target.path} yet: visitors are turned away until one is"
    if not is_loopback(target.host):
        return None
    try:
        found = [address for address, port in _listeners() if port == target.port]
    except (OSError, ValueError):
        return None
    if any(_serves(address, target.host) for address in found):
        return None
    others = " and ".join(join_host_port(str(address), target.port) for address in found)
    elsewhere = (
        f", but on {others}; is that meant?" if others else " yet: visitors are turned away until something does"
    )
    return f"nothing listens on {target}{elsewhere}"


def _listeners() -> Iterator[tuple[Address, int]]:
    """Where sockets of this network namespace listen. Raises `OSError`, and `ValueError` where it is told otherwise."""
    for table in filter(Path.exists, TABLES):
        for line in table.read_text().splitlines()[1:]:
            _slot, local, _remote, state, *_ = line.split()
            if state == LISTEN:
                host, _, port = local.partition(":")
                yield ipaddress.ip_address(b"".join(map(_octets, wrap(host, 8)))), int(port, 16)


def _octets(word: str) -> bytes:
    """Four, of a number that the kernel printed as if they were one of this processor's."""
    return int(word, 16).to_bytes(4, sys.byteorder)


def _serves(listener: Address, host: str) -> bool:
    """Whether who dials the host, which is of loopback, reaches this listener."""
    if host == "localhost":
        return listener.is_loopback or listener.is_unspecified or _mapped(listener).is_loopback
    wanted = ipaddress.ip_address(host)
    if listener.is_unspecified:
        return listener.version >= wanted.version  # that of IPv6 takes IPv4 as well, as a rule
    return wanted in {listener, _mapped(listener)}


def _mapped(address: Address) -> Address:
    """The IPv4 address inside an IPv4-mapped IPv6 one; any other as it is."""
    return getattr(address, "ipv4_mapped", None) or address
