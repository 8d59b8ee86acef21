"""The half of a tunnel that clients connect to: a listener, and the visitors that wait for a server connection.

A visitor that finds a server connection parked is paired inside the engine's callback and never has a task. One that
finds none waits in a task of the tunnel's nursery, until a server connection comes, `pairing_timeout` is over, or
the visitor leaves. One that a trusted proxy brings has a task until the proxy has said who it is; nobody else waits
for that.
"""

from __future__ import annotations

import socket
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import trio

from tunneld.admission import Admission, Refusal, Refused, Rules
from tunneld.backends import ServerConnection, ServerSide
from tunneld.config.schema import Tunnels
from tunneld.endpoint import Endpoint, Network, parse_network
from tunneld.errors import RemoteProtocolError, UsageError, reason_of
from tunneld.net import bind_in_range, taken_out
from tunneld.networks import NetworkSet, read_address
from tunneld.options import TunnelOptions
from tunneld.rates import Rate
from tunneld.relay.engine import Engine, Registration
from tunneld.relay.look import has_left
from tunneld.tunnel.proxied import receive_header


class Pairing(Protocol):
    """What a client side asks of its tunnel."""

    def full(self) -> Refusal | None:
        """Why no further visitor is taken, if so."""

    def pair(self, visitor: socket.socket, server: ServerConnection, peer: Any, reached: Any = None) -> None:
        """Relay between a visitor and a server connection; both belong to the tunnel from now on.

        `reached` is the address that the visitor connected to, where it is not that of the socket.
        """

    def gave_up(self, peer: Any, reason: str) -> None:
        """A visitor that had been admitted waited in vain and was closed."""

    def refused(self, peer: Any, refusal: Refusal) -> None:
        """A visitor was turned away and closed."""

    def fail(self, error: Exception) -> None:
        """A callback raised: a bug."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A visitor without a server connection, and how many seconds it has left to get one."""

    visitor: socket.socket
    peer: Any
    reached: Any  # the address that it connected to, where a proxy took the connection for us
    patience: float


@dataclass(frozen=True, slots=True)
class ClientLegacy:
    """What a client side leaves to its successor in the next process."""

    port: int
    listener: socket.socket | None  # None: it had been closed, for the tunnel is drained
    waiting: Sequence[Waiting] = ()


class ClientSide:
    """A listener for clients. Bound when made, listening from `listen`, gone after `close`."""

    def __init__(
        self,
        settings: Tunnels,
        options: TunnelOptions,
        advertised_host: str,
        reserved: Container[int] = (),
        legacy: ClientLegacy | None = None,
    ) -> None:
        """Bind the port asked for, or any of the range that is not `reserved`; or take over the `legacy` of another
        process.

        Raises `ListenError`, `LimitReachedError`, `ShortageError` or, where the port is outside the range or an
        option exceeds what is configured, `UsageError`.
        """
        self.rules = rules_of(settings, options)
        self.admission = None if self.rules.ask_nothing else Admission(self.rules)  # its owner tells it who left
        self._proxies = NetworkSet(map(parse_network, settings.trusted_proxies))
        self._settings = settings
        self._hearing = 0  # visitors of whom a proxy has not told yet
        self._listener = _bind(settings, options, reserved) if legacy is None else legacy.listener
        self._closed = self._listener is None
        port = self._listener.getsockname()[1] if self._listener is not None else legacy.port if legacy else 0
        self.uri = Endpoint("tcp", advertised_host, port)
        self._legacy = legacy
        self._line: dict[socket.socket, tuple[Any, Any, float]] = {}  # who waits; until when, in Trio's time
        self._pairing_timeout = options.pairing_timeout or settings.pairing_timeout
        self._accepting: Registration | None = None
        self._engine: Engine
        self._server_side: ServerSide
        self._tunnel: Pairing
        self._nursery: trio.Nursery

    def listen(self, engine: Engine, server_side: ServerSide, tunnel: Pairing, nursery: trio.Nursery) -> None:
        """Take visitors from now on; the tunnel's `nursery` owns those that wait."""
        self._engine, self._server_side, self._tunnel, self._nursery = engine, server_side, tunnel, nursery
        arrive = self._arrive if self._proxies else self._visit
        if self._listener is not None:
            self._accepting = engine.listen(self._listener, arrive, tunnel.fail)
        for one in self._legacy.waiting if self._legacy is not None else ():
            self._wait(one.visitor, one.peer, one.reached, one.patience)
        self._legacy = None

    @property
    def waiting(self) -> int:
        """Visitors that have no server connection yet."""
        return len(self._line)

    def pause(self) -> None:
        """Accept nobody for now; whoever comes stands in the listener's queue."""
        if self._accepting is not None:
            self._accepting.release()

    def leave(self) -> ClientLegacy:
        """Let go of the listener and of everybody who waits, closing nothing. Then `close`, as ever."""
        self.pause()
        now = trio.current_time()
        line, self._line = self._line, {}
        waiting = [
            Waiting(taken_out(visitor), peer, reached, max(0.0, deadline - now))
            for visitor, (peer, reached, deadline) in line.items()
        ]
        listener = taken_out(self._listener) if self._listener is not None and not self._closed else None
        return ClientLegacy(self.uri.port, listener, waiting)

    def close(self) -> None:
        """Take nobody new. Harmless when repeated."""
        self._closed = True
        if self._accepting is not None:
            self._accepting.release()
        if self._listener is not None:
            self._listener.close()

    def _arrive(self, visitor: socket.socket, peer: Any) -> None:
        """A client connected, or a proxy for one: hear who it is first."""
        if read_address(peer[0]) not in self._proxies:
            self._visit(visitor, peer)
        elif self.waiting + self._hearing >= self._settings.max_waiting:
            most = self._settings.max_waiting
            self._refuse(visitor, peer, Refusal(Refused.FULL, f"{most} visitors wait already (tunnels.max_waiting)"))
        else:
            self._hearing += 1
            self._nursery.start_soon(self._hear_proxy, visitor, peer)

    async def _hear_proxy(self, visitor: socket.socket, proxy: Any) -> None:
        """Hold one visitor until a proxy has said who it is, or `proxy_header_timeout` is over."""
        timeout = self._settings.proxy_header_timeout
        reason = f"no PROXY protocol header came in {timeout:g} s (tunnels.proxy_header_timeout)"
        header = None
        try:
            with trio.move_on_after(timeout):
                header = await receive_header(visitor)
        except RemoteProtocolError as error:
            reason = str(error)
        except OSError as error:
            reason = f"it broke off before its PROXY protocol header: {reason_of(error)}"
        finally:
            self._hearing -= 1
            if header is None:
                visitor.close()
        if header is None:
            self._tunnel.refused(proxy, Refusal(Refused.HEADER, reason))
        elif self._closed:
            self._refuse(visitor, header.source or proxy, Refusal(Refused.UNSERVED, "the tunnel takes nobody new"))
        else:
            self._visit(visitor, header.source or proxy, header.destination)

    def _refuse(self, visitor: socket.socket, peer: Any, refusal: Refusal) -> None:
        visitor.close()
        self._tunnel.refused(peer, refusal)

    def _visit(self, visitor: socket.socket, peer: Any, reached: Any = None) -> None:
        """A client is here: pair it at once where a server connection is parked, otherwise let it wait.

        `reached` is the address that it connected to, where a proxy took the connection for us.
        """
        refusal = self._tunnel.full()
        if refusal is None and self.admission is not None:
            refusal = self.admission.admit(peer[0], trio.current_time())
        if refusal is not None:
            self._refuse(visitor, peer, refusal)
            return
        try:
            server = self._server_side.dial_nowait()
        except trio.WouldBlock:
            self._wait(visitor, peer, reached, self._pairing_timeout)
        else:
            self._tunnel.pair(visitor, server, peer, reached)

    def _wait(self, visitor: socket.socket, peer: Any, reached: Any, patience: float) -> None:
        deadline = trio.current_time() + patience
        self._line[visitor] = (peer, reached, deadline)
        self._nursery.start_soon(self._wait_for_server, visitor, peer, reached, deadline)

    async def _wait_for_server(self, visitor: socket.socket, peer: Any, reached: Any, deadline: float) -> None:
        """Hold one visitor until a server connection comes, the visitor leaves, or `pairing_timeout` is over."""
        reason = f"no server connection came in {self._pairing_timeout:g} s (pairing_timeout)"
        server: ServerConnection | None = None

        def look() -> None:
            nonlocal reason
            if has_left(visitor):
                reason = "it left before a server connection came"
                scope.cancel()

        watching = self._engine.watch(visitor, look, self._tunnel.fail)
        try:
            with trio.move_on_at(deadline) as scope:
                server = await self._server_side.dial()
        except trio.ClosedResourceError:
            reason = "the tunnel takes nobody new"
        finally:
            self._line.pop(visitor, None)
            watching.release()
            if server is None:
                visitor.close()
        if server is None:
            self._tunnel.gave_up(peer, reason)
        else:
            self._tunnel.pair(visitor, server, peer, reached)


def rules_of(settings: Tunnels, options: TunnelOptions) -> Rules:
    """What the configuration and the options together ask of visitors.

    Raises `UsageError` where an option exceeds what is configured.
    """
    _check_most("max_visitors", options.max_visitors, settings.max_visitors)
    _check_most("max_per_source", options.max_per_source, settings.max_per_source)
    ceiling = Rate.parse(settings.visitor_rate) if settings.visitor_rate is not None else None
    if options.visitor_rate and ceiling and not options.visitor_rate.within(ceiling):
        raise UsageError(
            f"option visitor_rate={options.visitor_rate}: this relay takes no more than {ceiling}, neither at once nor "
            "in the long run"
        )
    return Rules(
        allow=(_networks(settings.allow_from), options.allow_from),
        deny=(*_networks(settings.deny_from), *options.deny_from),
        max_per_source=options.max_per_source or settings.max_per_source,
        rate=options.visitor_rate or ceiling,
        max_sources=settings.max_sources,
    )


def _networks(texts: tuple[str, ...]) -> tuple[Network, ...]:
    return tuple(map(parse_network, texts))


def _check_most(option: str, wanted: int | None, ceiling: int | None) -> None:
    if wanted is not None and ceiling is not None and wanted > ceiling:
        raise UsageError(f"option {option}={wanted}: this relay allows at most {ceiling}")


def _bind(settings: Tunnels, options: TunnelOptions, reserved: Container[int]) -> socket.socket:
    unless = reserved if options.client_port is None else ()
    return bind_in_range(settings.host, _ports(settings, options), keepalive=settings.keepalive, reserved=unless)


def _ports(settings: Tunnels, options: TunnelOptions) -> range:
    ports, wanted = settings.port_range, options.client_port
    if wanted is None:
        return ports
    if wanted not in ports and ports[0] != 0:
        raise UsageError(f"option client_port={wanted}: this relay's tunnels listen on {settings.ports}")
    return range(wanted, wanted + 1)
