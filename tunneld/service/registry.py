"""Which tunnels there are, whose each is, and what was counted of those that are no more.

This is all that a service knows; it is the seam at which several machines would share one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from tunneld.access import EVERYBODY, Grant
from tunneld.admission import Refused
from tunneld.endpoint import Endpoint
from tunneld.errors import NoSuchTunnelError
from tunneld.tunnel import Phase, Tunnel
from tunneld.tunnel.legacy import Past


class Registry:
    """The tunnels of a process, open or opening."""

    def __init__(self) -> None:
        self.opened = 0  # tunnels, ever
        self._tunnels: dict[str, Tunnel] = {}
        self._owners: dict[str, str] = {}  # by the ids of the same tunnels, the credentials that they are of
        self._last_id = 0
        self._past_octets = (0, 0)  # of tunnels that closed: up, down
        self._past_served = 0
        self._past_refusals = Counter[Refused]()

    # What people ask

    def tunnels(self, grant: Grant = EVERYBODY) -> Sequence[Tunnel]:
        """All open tunnels that are there for this grant, oldest first."""
        return [tunnel for tunnel in self._tunnels.values() if self.is_of(grant, tunnel.id)]

    def is_of(self, grant: Grant, tunnel: str) -> bool:
        """Whether a tunnel, by its id, is there for this grant: its own, or any for an admin."""
        return grant.is_admin or grant.name == self._owners.get(tunnel)

    def find(self, reference: str, grant: Grant = EVERYBODY) -> Tunnel:
        """The tunnel with this id, server URI, client URI or port of clients. Raises `NoSuchTunnelError`, also for one
        of others.
        """
        tunnel = self._tunnels.get(reference.lower())
        if tunnel is None and reference.isdigit():
            tunnel = self._newest(lambda one: str(one.client_uri.port) == reference)
        if tunnel is None and "://" in reference:
            endpoint = Endpoint.parse(reference.strip())
            tunnel = self._newest(lambda one: endpoint in {one.server_uri, one.client_uri})
        if tunnel is None or not self.is_of(grant, tunnel.id):
            raise NoSuchTunnelError(
                f"no open tunnel is called {reference!r}: give an id, a URI or a port that list shows"
            )
        return tunnel

    def get_tunnel_address(self, uri: str, grant: Grant = EVERYBODY) -> Endpoint:
        """The URI to advertise for a server URI. Raises `NoSuchTunnelError`, also for a tunnel that is drained and so
        takes nobody new, or `UsageError` where `uri` is none.
        """
        endpoint = Endpoint.parse(uri.strip())
        tunnel = self._newest(lambda one: one.server_uri == endpoint)
        if tunnel is None or not self.is_of(grant, tunnel.id):
            raise NoSuchTunnelError(f"no open tunnel has the server URI {endpoint.without_key}")
        if tunnel.phase is Phase.DRAINING:
            raise NoSuchTunnelError(f"tunnel {tunnel.id} is being drained and takes nobody new")
        return tunnel.client_uri

    def _newest(self, is_meant: Callable[[Tunnel], bool]) -> Tunnel | None:
        """Of those that are meant by an address the one that has it: an older one is being drained, and gave it up."""
        return next(filter(is_meant, reversed(self._tunnels.values())), None)

    @property
    def octets(self) -> tuple[int, int]:
        """Octets delivered since the start, by all tunnels: up, down."""
        up, down = self._past_octets
        for tunnel in self._tunnels.values():
            more_up, more_down = tunnel.octets
            up, down = up + more_up, down + more_down
        return up, down

    @property
    def served(self) -> int:
        """Visitors relayed since the start."""
        return self._past_served + sum(tunnel.served for tunnel in self._tunnels.values())

    @property
    def refusals(self) -> Counter[Refused]:
        """Visitors turned away since the start, by the class of the reason."""
        return sum((tunnel.refusals for tunnel in self._tunnels.values()), self._past_refusals)

    # As they come and go

    def _opened_by(self, owner: str) -> int:
        """How many tunnels a credential has."""
        return sum(one == owner for one in self._owners.values())

    def _enter(self, tunnel: Tunnel, owner: str) -> None:
        self._tunnels[tunnel.id] = tunnel
        self._owners[tunnel.id] = owner

    def _remove(self, tunnel: Tunnel) -> None:
        """Only what it has counted stays."""
        del self._tunnels[tunnel.id]
        del self._owners[tunnel.id]
        (up, down), (more_up, more_down) = self._past_octets, tunnel.octets
        self._past_octets = up + more_up, down + more_down
        self._past_served += tunnel.served
        self._past_refusals += tunnel.refusals

    @property
    def _past(self) -> Past:
        """For the next process."""
        refusals = {kind.value: count for kind, count in self._past_refusals.items()}
        return Past(self._last_id, self.opened, self._past_octets, self._past_served, refusals)

    def _resume(self, past: Past) -> None:
        """Go on where another process was."""
        self._last_id, self.opened = past.last_id, past.opened
        self._past_octets, self._past_served = past.octets, past.served
        self._past_refusals = Counter({Refused(kind): count for kind, count in past.refusals.items()})
