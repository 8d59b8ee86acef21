"""The local server: where it is, and how it is dialled for a visitor.

There are two ways. The short one takes no task: one `connect` on a non-blocking socket, which the engine joins while
it is still under way. It is right whenever the address is known, which after the first visitor is nearly always.

The long one awaits. It is for names that have several addresses of which one works (`localhost` is ::1 and 127.0.0.1,
and most servers listen on one of them), and for Unix sockets whose backlog is full, where the kernel tells a
non-blocking `connect` to come back later instead of putting it in line.

Whether anything listens where visitors are to go, seen without knocking there: `nc -l` takes one connection in its
life. Linux tells it in /proc/net/tcp (proc_pid_net(5)); elsewhere, and of other machines, nothing is known.
"""

from __future__ import annotations

import ipaddress
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from textwrap import wrap

import trio

from tunneld.net.dial import Address, dial, dial_nowait, resolve
from tunneld.net.endpoint import Target, is_loopback, join_host_port

REFRESH = 30.0
"""Seconds between look-ups of a name, so that a server that moved is found again."""
PATIENCE = 10.0
"""Seconds that a visitor waits for a full backlog or for a slow address; a browser waits longer."""
PAUSE = 0.01
"""Seconds between two knocks at a Unix socket whose backlog is full."""


class LocalServer:
    """A target and what is known about its addresses."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self._addresses: list[Address] = _literal(target)
        self._is_name = not self._addresses
        self._works = self._addresses[0] if self._addresses else None  # the short way goes there
        self._asked_at = float("-inf")

    def dial_nowait(self) -> socket.socket:
        """The short way. Raises `trio.WouldBlock` where only the long one will do, and `OSError`."""
        if self._works is None or (self._is_name and self._is_stale()):
            raise trio.WouldBlock
        try:
            return dial_nowait(self._works)
        except BlockingIOError:
            raise trio.WouldBlock from None

    async def dial(self) -> socket.socket:
        """The long way: every address in turn, in at most `PATIENCE` seconds. Raises the last `OSError`."""
        failure: OSError = TimeoutError(f"no answer in {PATIENCE:g} s")
        with trio.move_on_after(PATIENCE):
            for address in await self._look_up():
                try:
                    connection = await _dial_patiently(address)
                except OSError as error:
                    failure = error
                else:
                    self._works = address
                    return connection
        raise failure

    def failed(self) -> None:
        """A connection that the short way began was refused: where there are other addresses, try them next time."""
        if len(self._addresses) > 1:
            self._works = None

    def _is_stale(self) -> bool:
        return trio.current_time() - self._asked_at > REFRESH

    async def _look_up(self) -> Sequence[Address]:
        if self._is_name and self._is_stale():
            self._asked_at = trio.current_time()  # now, so that those who come meanwhile need not ask as well
            try:
                self._addresses = await resolve(self.target.host, self.target.port)
            except OSError:
                if not self._addresses:
                    raise  # otherwise the former ones are the best that is known
        if self._works not in self._addresses:
            self._works = self._addresses[0] if len(self._addresses) == 1 else None
        return self._addresses or await resolve(self.target.host, self.target.port)


async def _dial_patiently(address: Address) -> socket.socket:
    while True:
        try:
            return await dial(address)
        except BlockingIOError:
            await trio.sleep(PAUSE)


def _literal(target: Target) -> list[Address]:
    """The one address of a target that need not be looked up; none for a host name."""
    if target.path:
        return [(socket.AF_UNIX, target.path)]
    try:
        version = ipaddress.ip_address(target.host).version
    except ValueError:
        return []
    return [(socket.AF_INET if version == 4 else socket.AF_INET6, (target.host, target.port))]


TABLES: tuple[Path, ...] = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
LISTEN = "0A"
"""TCP_LISTEN, as the tables have it."""

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


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


def _listeners() -> Iterator[tuple[IpAddress, int]]:
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


def _serves(listener: IpAddress, host: str) -> bool:
    """Whether who dials the host, which is of loopback, reaches this listener."""
    if host == "localhost":
        return listener.is_loopback or listener.is_unspecified or _mapped(listener).is_loopback
    wanted = ipaddress.ip_address(host)
    if listener.is_unspecified:
        return listener.version >= wanted.version  # that of IPv6 takes IPv4 as well, as a rule
    return wanted in {listener, _mapped(listener)}


def _mapped(address: IpAddress) -> IpAddress:
    """The IPv4 address inside an IPv4-mapped IPv6 one; any other as it is."""
    return getattr(address, "ipv4_mapped", None) or address
