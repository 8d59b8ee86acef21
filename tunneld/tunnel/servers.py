"""What a tunnel decides about the connections of its hidden servers, for its server side."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunneld.engine.engine import Engine
from tunneld.net.address import Port
from tunneld.net.endpoint import Peer, format_peer
from tunneld.tunnel.events import Events
from tunneld.tunnel.server_side import Takeover, TunnelContext
from tunneld.tunnel.snapshot import TunnelSnapshot
from tunneld.tunnel.visitors import RefusalLog

if TYPE_CHECKING:
    from tunneld.tunnel.tunnel import Tunnel

NO_PUBLIC_PORT = 1
"""Names the channels of a private tunnel. No relay has it as a public port: it belongs to tcpmux (RFC 1078)."""


class HiddenServers:
    """Which hidden servers may connect, how many connections they may have, and what follows when they connect."""

    def __init__(self, tunnel: Tunnel, engine: Engine, events: Events, refusals: RefusalLog) -> None:
        self._tunnel = tunnel
        self._engine = engine
        self._events = events
        self._refusals = refusals

    def context(self, snapshot: TunnelSnapshot | None, takeover: Takeover) -> TunnelContext:
        """For the constructor of the server side."""
        tunnel, spec = self._tunnel, self._tunnel.spec
        return TunnelContext(
            engine=self._engine,
            settings=spec.settings,
            advertised_host=spec.advertised_host,
            client_port=self._public_port,
            services=spec.services,
            secure=spec.options.secure,
            persist=spec.limits.persist,
            former=spec.former_uri,
            ports=spec.ports,
            why_not_allowed=tunnel.agents.why_not_allowed,
            parking_capacity=self._parking_capacity,
            on_attached=self._on_attached,
            on_detached=self._on_detached,
            on_refused=self._refusals.server,
            on_failure=tunnel.fail,
            tenant=spec.tenant,
            shared=spec.options.share,
            private=spec.options.private is not None,
            node=spec.options.node,
            holder=spec.holder,
            snapshot=snapshot.server if snapshot is not None else None,
            takeover=takeover,
        )

    @property
    def _public_port(self) -> int:
        """Its own port, or the shared one where visitors reach it by names alone: WebMUX names channels by it. A
        private tunnel has none, and any number does.
        """
        for address in self._tunnel.addresses:
            if isinstance(address, Port):
                return address.number
        return self._tunnel.client_uri.port or NO_PUBLIC_PORT

    def _parking_capacity(self) -> int:
        tunnel, spec = self._tunnel, self._tunnel.spec
        if not spec.limits.persist:
            return 0 if tunnel.served else 1
        left = tunnel.server_side.connections + spec.tenant.server_connections_left
        return min(spec.settings.max_parked, left)

    def _on_attached(self, peer: Peer) -> None:
        self._tunnel.on_attached()
        if self._events.watched:
            self._events.publish("attached", id=self._tunnel.id, **{"from": format_peer(peer)})
        else:
            self._events.unseen += 1

    def _on_detached(self, peer: Peer) -> None:
        if self._events.watched:
            self._events.publish("detached", id=self._tunnel.id, **{"from": format_peer(peer)})
        else:
            self._events.unseen += 1
        self._tunnel.on_visitor_left("the server connection closed before a visitor arrived")
