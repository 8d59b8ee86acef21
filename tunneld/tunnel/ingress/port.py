"""A TCP port of the tunnel's own: the ingress that every tunnel has.

The engine accepts visitors in batches and passes them on in its callback. A connection of a trusted proxy has a task
until its PROXY protocol header has arrived; no other visitor is held up by that.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice

import trio

from tunneld.config.schema import TunnelSettings
from tunneld.engine.engine import Engine, FailureCallback, Registration
from tunneld.errors import LimitReachedError, ListenError, RemoteProtocolError, UsageError, reason_of
from tunneld.net.accept import local_address
from tunneld.net.address import Address, Port
from tunneld.net.endpoint import MAX_PORT, Endpoint, Peer, is_wildcard, parse_network
from tunneld.net.sockets import bind_in_range, bind_port, taken_out
from tunneld.policy.admission import AdmissionRefusal, RefusalKind
from tunneld.policy.limits import EffectiveLimits
from tunneld.policy.networks import NetworkSet, read_address
from tunneld.tunnel.ingress.ingress import Arrivals
from tunneld.tunnel.ingress.proxy_header import receive_header
from tunneld.tunnel.server_side import NO_TAKEOVER, Takeover
from tunneld.tunnel.snapshot import IngressSnapshot
from tunneld.tunnel.spec import TunnelSpec
from tunneld.tunnel.visitor import Visitor

MAX_TRIES = 16
"""Attempts to get several ports in a row from the system, which chooses at random: most succeed at once."""
MAX_CANDIDATES = 1000
"""Ports of the range that are looked at as the first of several in a row, so that a full relay answers soon."""


class PortIngress:
    """A listener for clients. Implements `Ingress`."""

    def __init__(
        self,
        spec: TunnelSpec,
        limits: EffectiveLimits,
        snapshot: IngressSnapshot | None = None,
        takeover: Takeover = NO_TAKEOVER,
        port: int | None = None,
    ) -> None:
        """Bind this port, or any port that the tunnel may get; or continue from the `snapshot` of another process.

        Raises `ListenError`, `LimitReachedError`, `ShortageError` or, where the port is outside the range,
        `UsageError`.
        """
        self.pending_headers = 0  # connections of trusted proxies before their PROXY protocol header
        self._settings = settings = spec.settings
        self._max_waiting = limits.max_waiting
        self._proxies = NetworkSet(map(parse_network, settings.trusted_proxies))
        self._listener = _bind(settings, spec, takeover, port) if snapshot is None else snapshot.listener
        self._closed = self._listener is None
        closed_port = snapshot.address.number if snapshot is not None and isinstance(snapshot.address, Port) else 0
        bound = local_address(self._listener) if self._listener is not None else ("", closed_port)
        self._reached: Peer | None = None if is_wildcard(bound[0]) else bound  # where there is only one such address
        self._address = Port(bound[1])
        self._uri = Endpoint("tcp", spec.options.bind or spec.advertised_host, bound[1])
        self._accepting: Registration | None = None
        self._arrivals: Arrivals
        self._nursery: trio.Nursery

    @property
    def address(self) -> Address:
        """The port."""
        return self._address

    @property
    def uri(self) -> Endpoint:
        """`tcp://HOST:PORT`."""
        return self._uri

    @property
    def listeners(self) -> Sequence[socket.socket]:
        """See `Ingress.listeners`."""
        return [self._listener] if self._listener is not None and not self._closed else []

    def listen(self, engine: Engine, arrivals: Arrivals, nursery: trio.Nursery, on_failure: FailureCallback) -> None:
        """See `Ingress.listen`."""
        self._arrivals, self._nursery = arrivals, nursery
        on_connection = self._on_connection if self._proxies else self._on_visitor
        if self._listener is not None:
            self._accepting = engine.listen(self._listener, on_connection, on_failure)

    def pause(self) -> None:
        """See `Ingress.pause`."""
        if self._accepting is not None:
            self._accepting.release()

    def leave_idle(self) -> None:
        """See `Ingress.leave_idle`: nothing is known of requests here."""

    def change(self, spec: TunnelSpec) -> None:
        """See `Ingress.change`: the tunnel itself applies the limits."""

    def export(self) -> IngressSnapshot:
        """See `Ingress.export`. A connection whose PROXY header is incomplete is closed."""
        self.pause()
        listener = taken_out(self._listener) if self._listener is not None and not self._closed else None
        return IngressSnapshot(self._address, listener)

    def close(self) -> None:
        """Stop listening."""
        self._closed = True
        self.pause()
        if self._listener is not None:
            self._listener.close()

    def _on_visitor(self, connection: socket.socket, peer: Peer) -> None:
        """The engine accepted a client."""
        self._arrivals.arrive(Visitor(connection, peer, self._reached))

    def _on_connection(self, connection: socket.socket, peer: Peer) -> None:
        """The engine accepted a client, or a trusted proxy, and then the header has to be read first."""
        max_waiting = self._max_waiting
        if read_address(peer[0]) not in self._proxies:
            self._on_visitor(connection, peer)
        elif len(self._arrivals) + self.pending_headers >= max_waiting:
            reason = f"limit reached: {max_waiting} visitors are waiting (tunnels.max_waiting)"
            self._arrivals.refuse(Visitor(connection, peer), AdmissionRefusal(RefusalKind.FULL, reason))
        else:
            self.pending_headers += 1
            self._nursery.start_soon(self._read_proxy_header, connection, peer)

    async def _read_proxy_header(self, connection: socket.socket, proxy: Peer) -> None:
        """Read the header of a trusted proxy, for at most `proxy_header_timeout`, and accept the visitor in it."""
        timeout = self._settings.proxy_header_timeout
        reason = f"no PROXY protocol header within {timeout:g} s (tunnels.proxy_header_timeout)"
        header = None
        try:
            with trio.move_on_after(timeout):
                header = await receive_header(connection)
        except RemoteProtocolError as error:
            reason = str(error)
        except OSError as error:
            reason = f"connection failed before its PROXY protocol header was complete: {reason_of(error)}"
        finally:
            self.pending_headers -= 1
            if header is None:
                connection.close()
        if header is None:
            self._arrivals.refuse(Visitor(connection, proxy), AdmissionRefusal(RefusalKind.HEADER, reason))
            return
        visitor = Visitor(connection, header.source or proxy, header.destination or self._reached)
        if self._closed:
            reason = "the tunnel accepts no new visitors"
            self._arrivals.refuse(visitor, AdmissionRefusal(RefusalKind.UNSERVED, reason))
        else:
            self._arrivals.arrive(visitor)


def open_ports(
    spec: TunnelSpec, limits: EffectiveLimits, snapshots: Sequence[IngressSnapshot], takeover: Takeover
) -> list[PortIngress]:
    """Open all public ports of a tunnel or none: the wanted ones, else consecutive ones, else any. Raises as
    `PortIngress`.
    """
    if snapshots:
        return _open_all([partial(PortIngress, spec, limits, one, takeover) for one in snapshots])
    opener = partial(PortIngress, spec, limits, None, takeover)
    count = spec.options.port_count
    if spec.wanted_ports or count == 1:
        return _open_all([partial(opener, port) for port in spec.wanted_ports or (None,)])
    for first in _first_ports(spec, count):
        try:
            return _open_all([partial(opener, port) for port in range(first, first + count)])
        except (LimitReachedError, ListenError):  # another program has one of them
            continue
    return _open_all([partial(opener, None)] * count)


def _first_ports(spec: TunnelSpec, count: int) -> Iterator[int]:
    """Ports of which as many in a row may be free."""
    ports = spec.settings.port_range
    if ports[0] == 0:  # the system chooses
        for _ in range(MAX_TRIES):
            with bind_in_range(_host(spec), ports, order=spec.ports) as probe:
                first = local_address(probe)[1]
            if first + count - 1 <= MAX_PORT:
                yield first
        return
    for first in list(islice(spec.ports.candidates(ports), MAX_CANDIDATES)):
        row = range(first, first + count)
        if row[-1] in ports and all(map(spec.ports.accepts, row)):
            yield first


def _open_all(openers: Sequence[Callable[[], PortIngress]]) -> list[PortIngress]:
    opened: list[PortIngress] = []
    try:
        for opener in openers:
            opened.append(opener())  # noqa: PERF401 - what was opened before an error has to be closed
    except BaseException:
        for one in opened:
            one.close()
        raise
    return opened


def _host(spec: TunnelSpec) -> str:
    return spec.options.bind or spec.settings.host


def _bind(settings: TunnelSettings, spec: TunnelSpec, takeover: Takeover, requested: int | None) -> socket.socket:
    ports = settings.port_range
    if requested is None:
        return bind_in_range(_host(spec), ports, keepalive=settings.keepalive, order=spec.ports)
    if requested not in ports and ports[0] != 0:
        raise UsageError(
            f"public port {requested} is outside the range of this relay: use one of {settings.ports} (client_port)"
        )
    return bind_port(_host(spec), requested, keepalive=settings.keepalive, held=takeover.listeners)
