"""The local server: its addresses, how it is dialled for a visitor, and whether anything listens there.

There are two ways to dial. The fast one needs no task: one `connect` on a non-blocking socket, which the engine joins
while it is still connecting. It is used whenever the address is known, which is nearly always the case after the first
visitor.

The slow one awaits. It is for names with several addresses of which one works (`localhost` is ::1 and 127.0.0.1, and
most servers listen on one of them), and for Unix sockets whose backlog is full: there the kernel refuses a non-blocking
`connect` with EAGAIN instead of queueing it.

Whether anything listens is found out without connecting, because `nc -l` accepts a single connection. Linux lists
listening sockets in /proc/net/tcp, see proc_pid_net(5). On other systems, and for other machines, it is unknown.
"""

from __future__ import annotations

import ipaddress
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import trio

from tunneld.net.dial import Address, dial, dial_nowait, resolve
from tunneld.net.endpoint import Target, is_loopback, join_host_port

RESOLVE_INTERVAL = 30.0
"""Seconds after which a name is resolved again, so that a server that moved is found."""
DIAL_TIMEOUT = 10.0
"""Seconds that a visitor waits for a full backlog or for an address that does not answer; browsers wait longer."""
BACKLOG_RETRY_DELAY = 0.01
"""Seconds between two attempts at a Unix socket whose backlog is full."""


class LocalServer:
    """A target, its resolved addresses, and the one that works."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self._addresses: list[Address] = _literal_address(target)
        self._is_name = not self._addresses
        self._working = self._addresses[0] if self._addresses else None  # the address that the fast way dials
        self._resolved_at = float("-inf")

    def dial_nowait(self) -> socket.socket:
        """Begin to connect, the fast way; the caller owns the socket.

        Raises `OSError`, and `trio.WouldBlock` where `dial` is needed.
        """
        if self._working is None or (self._is_name and self._is_stale()):
            raise trio.WouldBlock
        try:
            return dial_nowait(self._working)
        except BlockingIOError:
            raise trio.WouldBlock from None

    async def dial(self) -> socket.socket:
        """Connect, the slow way: each address in turn, within `DIAL_TIMEOUT`. The caller owns the socket. Raises the
        last `OSError`.
        """
        failure: OSError = TimeoutError(f"no answer in {DIAL_TIMEOUT:g} s")
        with trio.move_on_after(DIAL_TIMEOUT):
            for address in await self._resolve():
                try:
                    connection = await _dial_despite_backlog(address)
                except OSError as error:
                    failure = error
                else:
                    self._working = address
                    return connection
        raise failure

    def on_refused(self) -> None:
        """A connection that `dial_nowait` began was refused: if there are other addresses, try them next time."""
        if len(self._addresses) > 1:
            self._working = None

    def _is_stale(self) -> bool:
        return trio.current_time() - self._resolved_at > RESOLVE_INTERVAL

    async def _resolve(self) -> Sequence[Address]:
        if self._is_name and self._is_stale():
            self._resolved_at = trio.current_time()  # before the lookup, so that visitors meanwhile do not repeat it
            try:
                self._addresses = await resolve(self.target.host, self.target.port)
            except OSError:
                if not self._addresses:
                    raise  # otherwise the previous addresses are the best known
        if self._working not in self._addresses:
            self._working = self._addresses[0] if len(self._addresses) == 1 else None
        return self._addresses or await resolve(self.target.host, self.target.port)


async def _dial_despite_backlog(address: Address) -> socket.socket:
    while True:
        try:
            return await dial(address)
        except BlockingIOError:
            await trio.sleep(BACKLOG_RETRY_DELAY)


def _literal_address(target: Target) -> list[Address]:
    """The one address of a target that needs no lookup; an empty list for a host name."""
    if target.path:
        return [(socket.AF_UNIX, target.path)]
    try:
        version = ipaddress.ip_address(target.host).version
    except ValueError:
        return []
    return [(socket.AF_INET if version == 4 else socket.AF_INET6, (target.host, target.port))]


SOCKET_TABLES: tuple[Path, ...] = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
LISTEN_STATE = "0A"
"""TCP_LISTEN, as those tables print it."""

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
TABLE_AGE = 1.0
"""Seconds for which the table of listening sockets is used again: hundreds of exposures that start together read it
once. It takes the kernel milliseconds where a machine has thousands of connections.
"""


class ListeningSockets:
    """The listening TCP sockets of this network namespace: the port of each, and its address as the kernel has it."""

    def __init__(self) -> None:
        self._table: list[tuple[int, str]] = []
        self._read_at = float("-inf")  # in `trio.current_time`

    def table(self) -> list[tuple[int, str]]:
        """The sockets, as of at most `TABLE_AGE` ago. Raises `OSError`, and `ValueError` for an unknown format."""
        if trio.current_time() - self._read_at > TABLE_AGE:
            self._table = _listeners()
            self._read_at = trio.current_time()
        return self._table


def why_nothing_listens(target: Target, sockets: ListeningSockets | None = None) -> str | None:
    """A sentence for the user if nothing listens at the target; None if something does or it is unknown. Reads files,
    does not connect.
    """
    if target.path:
        if Path(target.path).is_socket():
            return None
        return f"there is no socket at {target.path}; start the local server: until then visitors are turned away"
    if not is_loopback(target.host):
        return None
    try:
        table = _listeners() if sockets is None else sockets.table()
        found = [_parse_address(address) for port, address in table if port == target.port]
    except (OSError, ValueError):
        return None
    if any(_serves(address, target.host) for address in found):
        return None
    if not found:
        return f"nothing listens on {target}; start the local server: until then visitors are turned away"
    elsewhere = " and ".join(join_host_port(str(address), target.port) for address in found)
    return (
        f"nothing listens on {target}, only on {elsewhere}; if that is the local server, use its address as the target"
    )


def _listeners() -> list[tuple[int, str]]:
    """The listening TCP sockets of this network namespace. Raises `OSError`, and `ValueError` for another format."""
    found: list[tuple[int, str]] = []
    for table in SOCKET_TABLES:
        if not table.exists():
            continue
        for line in table.read_text().splitlines()[1:]:
            _slot, local, _remote, state, *_ = line.split(maxsplit=4)
            if state == LISTEN_STATE:
                host, _, port = local.partition(":")
                found.append((int(port, 16), host))
    return found


def _parse_address(text: str) -> IpAddress:
    """Read an address as the kernel prints it: words of four bytes, each a number of this processor's byte order."""
    words = [int(text[start : start + 8], 16).to_bytes(4, sys.byteorder) for start in range(0, len(text), 8)]
    return ipaddress.ip_address(b"".join(words))


def _serves(listener: IpAddress, host: str) -> bool:
    """Whether a connection to `host`, a loopback name or address, reaches this listener."""
    if host == "localhost":
        return listener.is_loopback or listener.is_unspecified or _unmapped(listener).is_loopback
    address = ipaddress.ip_address(host)
    if listener.is_unspecified:
        return listener.version >= address.version  # a listener at :: takes IPv4 as well, by default
    return address in {listener, _unmapped(listener)}


def _unmapped(address: IpAddress) -> IpAddress:
    """The IPv4 address inside an IPv4-mapped IPv6 one; any other address unchanged."""
    return getattr(address, "ipv4_mapped", None) or address
