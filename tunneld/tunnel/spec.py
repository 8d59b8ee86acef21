"""The request for a tunnel, resolved: all that is known of a tunnel before it opens."""

from __future__ import annotations

from dataclasses import InitVar, dataclass, field

from tunneld.auth.authority import VisitorAuthority
from tunneld.config.schema import TunnelSettings
from tunneld.net.address import HostName, Private
from tunneld.net.endpoint import Endpoint, Network, parse_network
from tunneld.net.sockets import ANY_PORT, PortOrder
from tunneld.policy.access import EVERYBODY, Grant
from tunneld.policy.limits import EffectiveLimits, effective_limits
from tunneld.policy.options import ANYWHERE, Anywhere, TunnelOptions
from tunneld.tunnel.server_side import NO_SERVICES, BackendServices
from tunneld.tunnel.tenants import Tenant


@dataclass(frozen=True, slots=True)
class TunnelSpec:
    """All that is known of a tunnel before it opens. Its limits are computed once, when it is made: from the settings,
    from `grant`, and from the options, which may have those of the grant already.

    Making one raises `UsageError` where an option exceeds its ceiling.
    """

    id: str
    backend: str
    options: TunnelOptions  # afterwards with the limits of the grant, see `EffectiveLimits.bound`
    settings: TunnelSettings  # as they were when it was opened
    owner: str  # the requester, as `list` shows it
    requester_host: str  # its address: by default the only one that may connect as the hidden server
    advertised_host: str
    services: BackendServices = NO_SERVICES
    former_uri: Endpoint | None = None  # the server URI of the tunnel that it replaces
    ports: PortOrder = ANY_PORT  # that it may get
    wanted_ports: tuple[int, ...] = ()  # public ones that it is to get; empty: any
    asked_from: Network | Anywhere | None = None  # `server_from` as requested, before the grant bounded it
    tenant: Tenant = field(default_factory=Tenant)  # the owner's, shared by all its tunnels
    uid: str = ""  # globally unique
    generation: int = 1  # of the tunnels with its name and owner
    metered: int = 0  # bytes of earlier ones of them that count against the quota
    names: tuple[HostName, ...] = ()  # by which visitors reach it
    credential: str = ""  # of the requester
    changed: frozenset[str] = frozenset()  # options that were changed after it was opened
    grant: InitVar[Grant] = EVERYBODY
    limits: EffectiveLimits = field(init=False)

    def __post_init__(self, grant: Grant) -> None:
        limits = effective_limits(self.settings, grant, self.options)
        object.__setattr__(self, "limits", limits)
        object.__setattr__(self, "options", limits.bound(self.options))

    @property
    def private(self) -> Private | None:
        """Its address, where it is a private tunnel."""
        claim = self.options.private
        return None if claim is None else Private(claim.node, self.options.name)

    @property
    def holder(self) -> str:
        """The owner and the name, by which a tunnel that is opened again is the same one; empty without a name."""
        return f"{self.credential or self.requester_host} {self.options.name}" if self.options.name else ""

    @property
    def visitor_authority(self) -> VisitorAuthority:
        """Decides about its visitors, where the operator's authorization service is asked about them."""
        known = {"id": self.id, "name": self.options.name, "credential": self.credential, "backend": self.backend}
        known["host"] = " ".join(map(str, self.names))
        return VisitorAuthority(self.services.authority, known, self.credential or self.requester_host)

    @property
    def quota_left(self) -> int | None:
        """Bytes that its visitors may still send and receive; None: there is no quota."""
        return None if self.limits.quota is None else max(0, self.limits.quota - self.metered)

    @property
    def allowed_sources(self) -> Network | None:
        """The sources that may connect as the hidden server; None: any."""
        return self.allowed_sources_for(self.options.server_from, self.requester_host)

    def allowed_sources_for(self, server_from: Network | Anywhere | None, host: str) -> Network | None:
        """The same for an agent at the address `host` with the option `server_from`. An encrypted key lets a hidden
        server connect from any address; otherwise the default is the agent's own.
        """
        encrypted = self.services.backend(self.backend).is_encrypted(self.services, self.options)
        if server_from == ANYWHERE or (server_from is None and encrypted):
            return None
        return parse_network(host) if server_from is None else server_from
