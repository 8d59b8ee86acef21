"""Sockets that are on their way to somewhere: non-blocking from the first moment, so that no task waits for them."""

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

Address = tuple[socket.AddressFamily, Any]
"""A family and what `connect` of that family takes: a resolved host and port, or a path."""

KEEPALIVE = 60
"""Seconds: as the relay does it. Carrier NATs forget idle connections after 2 minutes and more."""

ASK_AGAIN = 1000
"""Milliseconds."""
TCP_RTO_MAX_MS = 44
"""Linux's number."""

_ON_ITS_WAY = frozenset({0, errno.EINPROGRESS})
_THIS_MACHINE = frozenset({"127.0.0.1", "::1"})
_AT_ONCE = getattr(socket, "SOCK_NONBLOCK", 0)


def dial_nowait(address: Address) -> socket.socket:
    """Begin to connect. A refusal that comes later shows on the socket.

    Raises `OSError` for one that comes at once, and for a shortage of descriptors. `BlockingIOError` is a Unix
    socket whose backlog is full.
    """
    family, where = address
    connection = socket.socket(family, socket.SOCK_STREAM | _AT_ONCE)
    try:
        if not _AT_ONCE:
            connection.setblocking(False)
        if family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if where[0] not in _THIS_MACHINE:  # its kernel knows when the other end is gone
                _keep_alive(connection)
        outcome = connection.connect_ex(where)
        if outcome not in _ON_ITS_WAY:
            raise OSError(outcome, os.strerror(outcome))
    except BaseException:
        connection.close()
        raise
    return connection


def check_not_refused(connection: socket.socket) -> None:
    """Raise `OSError`, and close, where a connection that was begun has been refused by now: this machine does so
    before `dial_nowait` returns, and some kernels of Linux do not say so then.
    """
    if outcome := connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
        connection.close()
        raise OSError(outcome, os.strerror(outcome))


def _keep_alive(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_KEEPIDLE"):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE)


async def resolve(host: str, port: int) -> list[Address]:
    """Look a host up, in the order in which its addresses should be tried. Raises `OSError`."""
    found = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys((family, address) for family, _, _, _, address in found))


async def resolve_relay(host: str, port: int) -> Address:
    """The address of a relay's server side: the first that answers. Raises `RelayUnreachableError`."""
    where = join_host_port(host, port)
    try:
        addresses = await resolve(host, port)
        if len(addresses) == 1:
            return addresses[0]
        return await first_that_answers(addresses)
    except OSError as error:
        raise RelayUnreachableError(f"could not connect to tcp://{where}: {reason_of(error)}") from None


async def first_that_answers(addresses: list[Address]) -> Address:
    """The first address at which a connection can be made; it is closed again. Raises the last `OSError`."""
    failure: OSError = OSError(errno.EADDRNOTAVAIL, "host has no address")
    for address in addresses:
        try:
            (await dial(address)).close()
        except OSError as error:
            failure = error
        else:
            return address
    raise failure


async def dial(address: Address) -> socket.socket:
    """Connect, and wait until it is done. Raises `OSError`."""
    connection = dial_nowait(address)
    try:
        with _hurry(connection):
            await trio.lowlevel.wait_writable(connection)
        outcome = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if outcome:
            raise OSError(outcome, os.strerror(outcome))
    except BaseException:
        connection.close()
        raise
    return connection


@contextmanager
def _hurry(connection: socket.socket) -> Iterator[None]:
    """While the block runs, who does not answer is asked again each second, where the kernel can be told (Linux 6.15):
    it would soon wait for four and for eight, and a network that comes back in between would not be noticed.
    """
    try:
        usual = connection.getsockopt(socket.IPPROTO_TCP, TCP_RTO_MAX_MS)
        connection.setsockopt(socket.IPPROTO_TCP, TCP_RTO_MAX_MS, ASK_AGAIN)
    except OSError:
        yield
    else:
        yield
        connection.setsockopt(socket.IPPROTO_TCP, TCP_RTO_MAX_MS, usual)
