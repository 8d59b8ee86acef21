"""What is known of a tunnel before it is open: by whom and how it was asked for, and where from."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from tunneld.config.schema import TunnelSettings
from tunneld.net.endpoint import Endpoint, Network, parse_network
from tunneld.policy.options import ANYWHERE, Anywhere, TunnelOptions
from tunneld.tunnel.server_side import NO_SERVICES, BackendServices


@dataclass(frozen=True, slots=True)
class TunnelSpec:
    """Everything that is known of a tunnel before it is open."""

    id: str
    backend: str
    options: TunnelOptions
    settings: TunnelSettings
    owner: str  # who asked, as `list` shows it
    requester_host: str  # the address that asked: by default the only one that may connect as the hidden server
    advertised_host: str
    services: BackendServices = NO_SERVICES
    former_uri: Endpoint | None = None  # the server URI of the tunnel whose place it takes
    reserved: Container[int] = ()  # ports that are somebody's, also where nobody listens
    asked_from: Network | Anywhere | None = None  # `server_from`, before a grant bounded it

    @property
    def allowed_sources(self) -> Network | None:
        """The sources that may connect as the hidden server; None means any."""
        return self.allowed_sources_for(self.options.server_from, self.requester_host)

    def allowed_sources_for(self, asked_for: Network | Anywhere | None, asker: str) -> Network | None:
        """The same for an agent at `asker` that may say where they come from."""
        hidden = self.services.backend(self.backend).hides_key(self.services, self.options)
        if asked_for == ANYWHERE or (asked_for is None and hidden):
            return None
        return parse_network(asker) if asked_for is None else asked_for
