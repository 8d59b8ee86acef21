"""Listening sockets, free ports and the limit of descriptors.

Sockets are the standard library's, non-blocking, listening, ready for the pump and for Trio alike. Options are set on
the listener: on Linux what it accepts inherits them (no-delay, keep-alive), which saves each visitor five system
calls.

Host names are looked up by the system and that blocks; addresses and wildcards do not.
"""

from __future__ import annotations

import errno
import random
import resource
import socket
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

from tunneld.errors import SHORTAGES, LimitReachedError, ListenError, ShortageError, TunneldError, reason_of
from tunneld.net.endpoint import format_peer

_LACKING = frozenset({errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL, errno.EPROTONOSUPPORT})
_MAX_KEEPALIVE = 32767  # seconds: Linux's MAX_TCP_KEEPIDLE
_PROBES = 4  # a quarter of the idle time apart, so that a peer that vanished is noticed after twice that time

LOW_PORTS = ": ports below 1024 want CAP_NET_BIND_SERVICE (AmbientCapabilities= of the unit)"
KEPT_FREE = 64
"""Descriptors: two dozen for those who ask, as many for a child process and the files of a reload, and some to spare.
At most a quarter of what there is.
"""

Address = tuple[socket.AddressFamily, str]
"""A family and a numeric host of it to bind; an empty IPv6 host means both families on one socket."""


def bind_tcp(
    host: str, port: int, *, backlog: int = 1024, keepalive: float = 60.0, held: Sequence[socket.socket] = ()
) -> list[socket.socket]:
    """Listen on every address of `host`, all on the same port; 0 means any free one.

    `""` and `::` mean every address of the machine, in one dual-stack socket where it has IPv6. `keepalive` is in
    seconds: TCP probes a connection that was silent for so long, and gives it up after about twice the time. `backlog`
    is in connections; the kernel caps it (`net.core.somaxconn`). `held` are listeners of ours that are to give way:
    one that has an address that is asked for is among the result, and none keeps the others from being bound.

    Raises `ListenError`, or `ShortageError` when descriptors or socket memory ran out; `held` are as they were then.
    """
    try:
        with _lent(held):
            return _bind_all(_addresses(host), port, backlog, keepalive, held)
    except OSError as error:
        raise _listen_error(host, str(port), error) from None


def bind_in_range(
    host: str,
    ports: range,
    *,
    backlog: int = 1024,
    keepalive: float = 60.0,
    start: int | None = None,
    reserved: Container[int] = (),
) -> socket.socket:
    """Listen on a free port of `ports` that is not `reserved`, on the first address of `host`; `range(0, 1)` means any
    free port.

    The search goes upwards and around from a random port, or from the `start`th. So a port that just became free, whose
    old clients may still call, is unlikely to be the next one given out, and strangers cannot count up to the newest
    tunnel.

    Raises `LimitReachedError` when none is free; else as `bind_tcp`.
    """
    first = random.randrange(len(ports)) if start is None else start % len(ports)
    span = f"{ports[0]}-{ports[-1]}" if len(ports) > 1 else f"{ports[0]}"
    wanted = (port for port in chain(ports[first:], ports[:first]) if port not in reserved)
    try:
        if ports[0] == 0:
            return _bind_any(_addresses(host)[0], backlog, keepalive, reserved)
        return _bind(_addresses(host)[0], wanted, backlog, keepalive)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            kept = sum(port in reserved for port in ports)
            but = f"; {kept} are reserved for tunnels that have names (tunnels.reservation)" if kept else ""
            raise LimitReachedError(f"no port is free in {span} on {host or '*'}{but}") from None
        raise _listen_error(host, span, error) from None


def describe(listeners: list[socket.socket], scheme: str = "tcp") -> str:
    """Where sockets listen, as URIs with the ports they got: `tcp://127.0.0.1:7010`."""
    return " ".join(f"{scheme}://{format_peer(listener.getsockname())}" for listener in listeners)


def taken_out(holder: socket.socket) -> socket.socket:
    """The same socket, for another owner: the object that had it is as if it were closed."""
    taken = socket.socket(holder.family, holder.type, holder.proto, fileno=holder.detach())
    taken.setblocking(False)
    return taken


def raise_descriptor_limit() -> int:
    """Allow this process as many descriptors as it may have (RLIMIT_NOFILE, soft to hard) and return how many those
    are.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError):  # macOS calls its hard limit infinite and refuses to go there
        return soft
    return hard


def descriptors_for_tunnels() -> int:
    """The first number of a descriptor that connections to tunnels leave to others: the control port and the HTTP face,
    over which somebody may find out who has all the others, and what a restart or a reload opens.
    """
    soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (1 << 30) if soft == resource.RLIM_INFINITY else soft - min(KEPT_FREE, soft // 4)


def open_descriptors() -> int:
    """How many descriptors this process has open, the one used to look included."""
    return sum(1 for _ in Path("/dev/fd").iterdir())


def _addresses(host: str) -> list[Address]:
    if host in {"", "::"}:
        return [(socket.AF_INET6, "")] if socket.has_dualstack_ipv6() else [(socket.AF_INET, "0.0.0.0")]
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return list(dict.fromkeys((family, str(address[0])) for family, _, _, _, address in found))


@contextmanager
def _lent(held: Sequence[socket.socket]) -> Iterator[None]:
    """While this lasts, sockets of this user can be bound over these: a wildcard over one address, or the other way
    round, which the kernel refuses while either listens. So the new one is there before the old one goes.
    """
    _set_shared(held, True)
    try:
        yield
    finally:
        _set_shared(held, False)


def _set_shared(listeners: Iterable[socket.socket], shared: bool) -> None:
    if hasattr(socket, "SO_REUSEPORT"):
        for listener in listeners:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, shared)


def _bind_all(
    addresses: list[Address], port: int, backlog: int, keepalive: float, held: Sequence[socket.socket]
) -> list[socket.socket]:
    """One listener an address. An address that the machine lacks is passed over while another one works."""
    listeners: list[socket.socket] = []
    failures: list[OSError] = []
    for address in addresses:
        try:
            listeners.append(
                _holder(held, address, port) or _bind(address, [port], backlog, keepalive, shared=bool(held))
            )
            port = listeners[0].getsockname()[1]
        except OSError as error:
            failures.append(error)
    fatal = [error for error in failures if not listeners or error.errno not in _LACKING]
    if fatal:
        for listener in listeners:
            if listener not in held:
                listener.close()
        raise fatal[0]
    return listeners


def _holder(held: Sequence[socket.socket], address: Address, port: int) -> socket.socket | None:
    """The one of them that listens there already."""
    family, host = address
    for listener in held:
        at = listener.getsockname()
        if listener.family == family and at[0] == (host or "::") and port in {0, at[1]}:
            return listener
    return None


def _bind(
    address: Address, ports: Iterable[int], backlog: int, keepalive: float, *, shared: bool = False
) -> socket.socket:
    family, host = address
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # restart while old connections are in TIME_WAIT
        if shared:
            _set_shared([listener], True)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1 if host else 0)
        _take_free_port(listener, host, ports)
        _set_inherited(listener, keepalive)
        listener.setblocking(False)
        listener.listen(backlog)
        if shared:
            _set_shared([listener], False)
    except BaseException:
        listener.close()
        raise
    return listener


def _bind_any(address: Address, backlog: int, keepalive: float, reserved: Container[int]) -> socket.socket:
    """Whatever port the system gives, but none that is reserved: those are held until it gives another one."""
    refused: list[socket.socket] = []
    try:
        while True:
            listener = _bind(address, [0], backlog, keepalive)
            if listener.getsockname()[1] not in reserved:
                return listener
            refused.append(listener)
    finally:
        for listener in refused:
            listener.close()


def _take_free_port(listener: socket.socket, host: str, ports: Iterable[int]) -> None:
    """Bind to the first port that nobody has. A refused socket may ask again: 10,000 taken ports cost 15 ms."""
    taken: OSError | None = None
    for port in ports:
        try:
            return listener.bind((host, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            taken = error
    raise taken or OSError(errno.EADDRINUSE, "no port to choose from")


def _set_inherited(listener: socket.socket, keepalive: float) -> None:
    idle = min(max(1, round(keepalive)), _MAX_KEEPALIVE)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", idle), ("TCP_KEEPINTVL", max(1, idle // _PROBES)), ("TCP_KEEPCNT", _PROBES)):
        if hasattr(socket, name):  # other systems have fewer knobs
            listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _listen_error(host: str, ports: str, error: OSError) -> TunneldError:
    place = f"tcp://[{host}]:{ports}" if ":" in host else f"tcp://{host or '*'}:{ports}"
    kind = ShortageError if error.errno in SHORTAGES else ListenError
    hint = LOW_PORTS if error.errno == errno.EACCES else ""
    return kind(f"could not listen on {place}: {reason_of(error)}{hint}")
