"""Outgoing connections. Their sockets are non-blocking from the start, so no task has to wait for one to connect."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import trio

from tunneld.errors import RelayUnreachableError, reason_of
from tunneld.net.endpoint import join_host_port
from tunneld.net.liveness import set_keepalive
from tunneld.net.sockets import pending_error

Address = tuple[socket.AddressFamily, Any]
"""A family, and what `connect` of that family takes: a resolved host and port, or a path."""

KEEPALIVE_SECONDS = 60.0
"""Idle time before TCP probes the peer, as on the relay. Carrier NATs drop idle connections after 2 minutes or more."""

MAX_SYN_INTERVAL_MS = 1000
"""Milliseconds between two SYNs while `dial` waits."""
TCP_RTO_MAX_MS = 44
"""The socket option (Linux 6.15); Python has no name for it."""

_CONNECTING = frozenset({0, errno.EINPROGRESS})
_LOOPBACK_HOSTS = frozenset({"127.0.0.1", "::1"})
_SOCK_NONBLOCK = getattr(socket, "SOCK_NONBLOCK", 0)


def dial_nowait(address: Address, keepalive: float = KEEPALIVE_SECONDS) -> socket.socket:
    """Begin to connect and return the socket, which the caller owns. A later refusal shows on the socket. `keepalive`
    is the silence in seconds before TCP probes the peer.

    Raises `OSError` for an immediate refusal and for a shortage of descriptors. `BlockingIOError` means a Unix socket
    with a full backlog.
    """
    family, where = address
    connection = socket.socket(family, socket.SOCK_STREAM | _SOCK_NONBLOCK)
    try:
        if not _SOCK_NONBLOCK:
            connection.setblocking(False)
        if family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if where[0] not in _LOOPBACK_HOSTS:  # on loopback the kernel knows when the peer is gone
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                set_keepalive(connection, keepalive)
        outcome = connection.connect_ex(where)
        if outcome not in _CONNECTING:
            raise OSError(outcome, os.strerror(outcome))
    except BaseException:
        connection.close()
        raise
    return connection


def check_not_refused(connection: socket.socket) -> None:
    """Close the socket and raise `OSError` if the connect has been refused by now.

    On loopback the refusal comes before `dial_nowait` returns, but some Linux kernels do not report it there.
    """
    if (error := pending_error(connection)) is not None:
        connection.close()
        raise error


async def resolve(host: str, port: int) -> list[Address]:
    """Resolve a host; the addresses are in the order in which to try them. Raises `OSError`."""
    found = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys((family, address) for family, _, _, _, address in found))


async def resolve_relay(host: str, port: int) -> Address:
    """The first reachable address of the relay. Raises `RelayUnreachableError`."""
    where = join_host_port(host, port)
    try:
        addresses = await resolve(host, port)
        if len(addresses) == 1:
            return addresses[0]
        return await first_reachable(addresses)
    except OSError as error:
        raise RelayUnreachableError(f"could not connect to tcp://{where}: {reason_of(error)}") from None


async def first_reachable(addresses: list[Address]) -> Address:
    """The first address that accepts a connection, which is closed again. Raises the `OSError` of the last address."""
    failure: OSError = OSError(errno.EADDRNOTAVAIL, "the host name has no address")
    for address in addresses:
        try:
            (await dial(address)).close()
        except OSError as error:
            failure = error
        else:
            return address
    raise failure


async def dial(address: Address, keepalive: float = KEEPALIVE_SECONDS) -> socket.socket:
    """Connect and return the socket, which the caller owns. Raises `OSError`. There is no deadline but the kernel's.
    `keepalive` as for `dial_nowait`.
    """
    connection = dial_nowait(address, keepalive)
    try:
        with _frequent_syns(connection):
            await trio.lowlevel.wait_writable(connection)
        if (error := pending_error(connection)) is not None:
            raise error
    except BaseException:
        connection.close()
        raise
    return connection


@contextmanager
def _frequent_syns(connection: socket.socket) -> Iterator[None]:
    """Inside the block, send a SYN every second, if the kernel supports that (Linux 6.15).

    By default the interval doubles to four and eight seconds, and a network that comes back meanwhile goes unnoticed.
    """
    try:
        default = connection.getsockopt(socket.IPPROTO_TCP, TCP_RTO_MAX_MS)
        connection.setsockopt(socket.IPPROTO_TCP, TCP_RTO_MAX_MS, MAX_SYN_INTERVAL_MS)
    except OSError:
        yield
    else:
        yield
        connection.setsockopt(socket.IPPROTO_TCP, TCP_RTO_MAX_MS, default)
