"""Listening sockets, free ports and the limit of descriptors.

Sockets are the standard library's, non-blocking and listening, ready for the pump and for Trio alike. Options are set
on the listener: on Linux an accepted connection inherits them (no-delay, keep-alive), which saves five system calls per
visitor.

Host names are resolved by the system, which blocks; addresses and wildcards do not block.
"""

from __future__ import annotations

import errno
import os
import random
import resource
import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from tunneld.errors import SHORTAGES, LimitReachedError, ListenError, ShortageError, TunneldError, reason_of
from tunneld.net.endpoint import format_peer
from tunneld.net.liveness import set_keepalive

if TYPE_CHECKING:
    import trio

_NO_SUCH_ADDRESS = frozenset({errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL, errno.EPROTONOSUPPORT})

LOW_PORT_HINT = ": ports below 1024 require CAP_NET_BIND_SERVICE (AmbientCapabilities= in the systemd unit)"
RESERVED_DESCRIPTORS = 64
"""Descriptors that visitors do not get: two dozen for control connections, as many for a child process and the files of
a reload, and some to spare. At most a quarter of all.
"""

BindTarget = tuple[socket.AddressFamily, str]
"""A family and a numeric host to bind; an empty IPv6 host means both families on one socket."""


def bind_tcp(
    host: str, port: int, *, backlog: int = 1024, keepalive: float = 60.0, held: Sequence[socket.socket] = ()
) -> list[socket.socket]:
    """Listen on every address of `host`, all on the same port; 0 means any free port.

    `""` and `::` mean every address of the machine, in one dual-stack socket if it has IPv6. `keepalive` is in seconds:
    TCP probes a connection that was idle for so long, and drops it after about twice the time. `backlog` is in
    connections; the kernel caps it (`net.core.somaxconn`). `held` are listeners of ours that are being replaced: a
    listener that already has a requested address is returned in the result, and none of them prevents a bind.

    The caller owns the new sockets. Raises `ListenError`, or `ShortageError` when descriptors or socket memory ran out;
    `held` is unchanged then.
    """
    try:
        with _ports_shared(held):
            return _bind_all(_addresses(host), port, backlog, keepalive, held)
    except OSError as error:
        raise _listen_error(host, str(port), error) from None


class PortOrder(Protocol):
    """Which ports of a range may be used, and in which order they are tried."""

    def candidates(self, ports: range) -> Iterable[int]:
        """The ports to try, in this order."""

    def accepts(self, port: int) -> bool:
        """Whether a port that the system has chosen may be used."""

    def why_none(self, ports: range) -> str:
        """Why no port may be free, for the error; empty: because other programs use them."""


class UpwardsFrom:
    """All ports, upwards from the `start`th or a random one, and from the first after the last. A `PortOrder`.

    So a port that has just become free, which its old clients may still use, is unlikely to be assigned next, and the
    newest tunnel cannot be found by counting ports.
    """

    def __init__(self, start: int | None = None) -> None:
        self._start = start

    def candidates(self, ports: range) -> Iterable[int]:
        """See `PortOrder.candidates`."""
        first = random.randrange(len(ports)) if self._start is None else self._start % len(ports)
        return chain(ports[first:], ports[:first])

    def accepts(self, _port: int) -> bool:
        """See `PortOrder.accepts`."""
        return True

    def why_none(self, _ports: range) -> str:
        """See `PortOrder.why_none`."""
        return ""


ANY_PORT: PortOrder = UpwardsFrom()


def bind_in_range(
    host: str, ports: range, *, backlog: int = 1024, keepalive: float = 60.0, order: PortOrder = ANY_PORT
) -> socket.socket:
    """Listen on a free port of `ports`, on the first address of `host`; `range(0, 1)` means any free port.

    Raises `LimitReachedError` when no port is free; otherwise as `bind_tcp`.
    """
    address = _addresses(host)[0]
    try:
        if ports[0] == 0:
            return _bind_any(address, backlog, keepalive, order)
        return _bind(address, order.candidates(ports), backlog, keepalive)
    except OSError as error:
        raise _range_error(host, ports, order.why_none(ports), error) from None


def bind_port(
    host: str, port: int, *, backlog: int = 1024, keepalive: float = 60.0, held: Sequence[socket.socket] = ()
) -> socket.socket:
    """Listen on one port, on the first address of `host`.

    `held` are listeners that the new one will replace. Of one with this address and port a duplicate is returned: both
    accept from the same queue of connections, so the port has a listener all the time. None of them prevents a bind,
    and all are unchanged afterwards. Raises as `bind_in_range`.
    """
    address = _addresses(host)[0]
    try:
        if (listener := _find_held(held, address, port)) is not None:
            return listener.dup()
        with _ports_shared(held):
            return _bind(address, [port], backlog, keepalive, shared=bool(held))
    except OSError as error:
        raise _range_error(host, range(port, port + 1), "", error) from None


def describe(listeners: list[socket.socket], scheme: str = "tcp") -> str:
    """Print where sockets listen, as URIs with their actual ports: `tcp://127.0.0.1:7010`."""
    return " ".join(f"{scheme}://{format_peer(listener.getsockname())}" for listener in listeners)


def taken_out(holder: socket.socket | trio.socket.SocketType) -> socket.socket:
    """Move a socket into a new object for another owner; afterwards `holder` behaves like a closed socket."""
    taken = socket.socket(holder.family, holder.type, holder.proto, fileno=holder.detach())
    taken.setblocking(False)
    return taken


class HasSocketOptions(Protocol):
    """A socket of the standard library or of Trio."""

    def getsockopt(self, level: int, option: int, /) -> int:
        """Return one option, as the standard library does."""


def pending_error(connection: HasSocketOptions) -> OSError | None:
    """Return the error that the kernel has recorded for a socket (SO_ERROR), or None. Reads nothing from the stream."""
    number = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    return OSError(number, os.strerror(number)) if number else None


def raise_descriptor_limit() -> int:
    """Raise this process's soft limit of descriptors (RLIMIT_NOFILE) to the hard limit and return the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError):  # macOS reports an infinite hard limit and refuses to set it
        return soft
    return hard


def descriptors_for_tunnels() -> int:
    """The number from which on descriptors are reserved (`EngineLimits.descriptors`).

    The rest is for the control port and the HTTP port, so that an operator can find out what uses the descriptors, and
    for what a restart or a reload opens.
    """
    soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (1 << 30) if soft == resource.RLIM_INFINITY else soft - min(RESERVED_DESCRIPTORS, soft // 4)


def open_descriptors() -> int:
    """The number of descriptors that this process has open, including the one used to count them."""
    return sum(1 for _ in Path("/dev/fd").iterdir())


def _addresses(host: str) -> list[BindTarget]:
    if host in {"", "::"}:
        return [(socket.AF_INET6, "")] if socket.has_dualstack_ipv6() else [(socket.AF_INET, "0.0.0.0")]
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return list(dict.fromkeys((family, str(address[0])) for family, _, _, _, address in found))


@contextmanager
def _ports_shared(held: Sequence[socket.socket]) -> Iterator[None]:
    """Inside the block, sockets of this user can be bound over these listeners (SO_REUSEPORT): a wildcard over an
    address, or the reverse, which the kernel otherwise refuses. So the new listener exists before the old one closes.
    """
    _set_port_shared(held, True)
    try:
        yield
    finally:
        _set_port_shared(held, False)


def _set_port_shared(listeners: Iterable[socket.socket], shared: bool) -> None:
    if hasattr(socket, "SO_REUSEPORT"):
        for listener in listeners:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, shared)


def _bind_all(
    addresses: list[BindTarget], port: int, backlog: int, keepalive: float, held: Sequence[socket.socket]
) -> list[socket.socket]:
    """Bind one listener per address. An address that the machine lacks is skipped if another one works."""
    listeners: list[socket.socket] = []
    failures: list[OSError] = []
    for address in addresses:
        try:
            listeners.append(
                _find_held(held, address, port) or _bind(address, [port], backlog, keepalive, shared=bool(held))
            )
            port = listeners[0].getsockname()[1]
        except OSError as error:
            failures.append(error)
    fatal = [error for error in failures if not listeners or error.errno not in _NO_SUCH_ADDRESS]
    if fatal:
        for listener in listeners:
            if listener not in held:
                listener.close()
        raise fatal[0]
    return listeners


def _find_held(held: Sequence[socket.socket], address: BindTarget, port: int) -> socket.socket | None:
    """The listener of `held` that has this address and port already."""
    family, host = address
    for listener in held:
        bound = listener.getsockname()
        if listener.family == family and bound[0] == (host or "::") and port in {0, bound[1]}:
            return listener
    return None


def _bind(
    address: BindTarget, ports: Iterable[int], backlog: int, keepalive: float, *, shared: bool = False
) -> socket.socket:
    family, host = address
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # restart while old connections are in TIME_WAIT
        if shared:
            _set_port_shared([listener], True)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1 if host else 0)
        _take_free_port(listener, host, ports)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        set_keepalive(listener, keepalive)
        listener.setblocking(False)
        listener.listen(backlog)
        if shared:
            _set_port_shared([listener], False)
    except BaseException:
        listener.close()
        raise
    return listener


def _bind_any(address: BindTarget, backlog: int, keepalive: float, order: PortOrder) -> socket.socket:
    """Bind a port that the system chooses; ones that may not be used are kept bound until it chooses another."""
    refused: list[socket.socket] = []
    try:
        while True:
            listener = _bind(address, [0], backlog, keepalive)
            if order.accepts(listener.getsockname()[1]):
                return listener
            refused.append(listener)
    finally:
        for listener in refused:
            listener.close()


def _take_free_port(listener: socket.socket, host: str, ports: Iterable[int]) -> None:
    """Bind to the first free port, with one socket for all tries: 10,000 taken ports cost 15 ms."""
    taken: OSError | None = None
    for port in ports:
        try:
            return listener.bind((host, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            taken = error
    raise taken or OSError(errno.EADDRINUSE, "no port to choose from")


def _range_error(host: str, ports: range, why_none: str, error: OSError) -> TunneldError:
    span = f"{ports[0]}-{ports[-1]}" if len(ports) > 1 else f"{ports[0]}"
    if error.errno != errno.EADDRINUSE:
        return _listen_error(host, span, error)
    return LimitReachedError(f"no port is free in {span} on {host or '*'}" + (f"; {why_none}" if why_none else ""))


def _listen_error(host: str, ports: str, error: OSError) -> TunneldError:
    place = f"tcp://[{host}]:{ports}" if ":" in host else f"tcp://{host or '*'}:{ports}"
    kind = ShortageError if error.errno in SHORTAGES else ListenError
    hint = LOW_PORT_HINT if error.errno == errno.EACCES else ""
    return kind(f"could not listen on {place}: {reason_of(error)}{hint}")
