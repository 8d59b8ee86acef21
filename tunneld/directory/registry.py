"""Which tunnels there are, whose each is, and what was counted of those that are no more.

This is all that a service knows; it is the seam at which several machines would share one.

Several agents behind one name: whether what one of them asks for agrees with the tunnel that the others serve.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

from tunneld.errors import EndedError, NoSuchTunnelError, UsageError
from tunneld.net.endpoint import Endpoint
from tunneld.policy.access import EVERYBODY, Grant
from tunneld.policy.admission import RefusalKind
from tunneld.policy.options import TunnelOptions
from tunneld.tunnel.snapshot import ServiceCounters
from tunneld.tunnel.tunnel import Phase, Tunnel

MAX_ENDED = 1024
"""Tunnels that were ended on purpose of which we remember why, at about 300 octets each. An agent asks within seconds,
one that is away when it is back; to one that was forgotten its tunnel is gone, and it opens another.
"""


class TunnelRegistry:
    """The tunnels of a process, open or opening."""

    def __init__(self) -> None:
        self.opened = 0  # tunnels, ever
        self._tunnels: dict[str, Tunnel] = {}
        self._owners: dict[str, str] = {}  # by the ids of the same tunnels, the credentials that they are of
        self._last_id = 0
        self._ended: dict[Endpoint, tuple[str, str]] = {}  # by server URI, of whom it was and why it ended on purpose
        self._past_octets = (0, 0)  # of tunnels that closed: up, down
        self._past_served = 0
        self._past_refusals = Counter[RefusalKind]()

    # What people ask

    def tunnels(self, grant: Grant = EVERYBODY) -> Sequence[Tunnel]:
        """All open tunnels that are there for this grant, oldest first."""
        return [tunnel for tunnel in self._tunnels.values() if self.is_of(grant, tunnel.id)]

    def is_of(self, grant: Grant, tunnel: str) -> bool:
        """Whether a tunnel, by its id, is there for this grant: its own, or any for an admin."""
        return grant.is_admin or grant.name == self._owners.get(tunnel)

    def find(self, reference: str, grant: Grant = EVERYBODY) -> Tunnel:
        """The tunnel with this id, server URI, client URI or port of clients. Raises `NoSuchTunnelError`, also for one
        of others, or `EndedError` where the server URI is that of one that was closed on purpose.
        """
        tunnel = self._tunnels.get(reference.lower())
        if tunnel is None and reference.isdigit():
            tunnel = self._newest(lambda one: str(one.client_uri.port) == reference)
        if tunnel is None and "://" in reference:
            endpoint = Endpoint.parse(reference.strip())
            tunnel = self._newest(lambda one: endpoint in {one.server_uri, one.client_uri})
            if tunnel is None:
                self._check_not_ended(endpoint, grant)
        if tunnel is None or not self.is_of(grant, tunnel.id):
            raise NoSuchTunnelError(
                f"no open tunnel is called {reference!r}: give an id, a URI or a port that list shows"
            )
        return tunnel

    def get_tunnel_address(self, uri: str, grant: Grant = EVERYBODY) -> Endpoint:
        """The URI to advertise for a server URI. Raises `NoSuchTunnelError`, also for a tunnel that is drained and so
        takes nobody new, `EndedError` for one that was closed or is drained on purpose, or `UsageError` where `uri` is
        none.
        """
        endpoint = Endpoint.parse(uri.strip())
        tunnel = self._newest(lambda one: one.server_uri == endpoint)
        if tunnel is None or tunnel.phase is Phase.DRAINING:
            self._check_not_ended(endpoint, grant)
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
    def refusals(self) -> Counter[RefusalKind]:
        """Visitors turned away since the start, by the class of the reason."""
        return sum((tunnel.refusals for tunnel in self._tunnels.values()), self._past_refusals)

    def _check_not_ended(self, server: Endpoint, grant: Grant) -> None:
        owner, why = self._ended.get(server, ("", ""))
        if why and (grant.is_admin or grant.name == owner):
            raise EndedError(why)

    # As they come and go

    def _opened_by(self, owner: str) -> int:
        """How many tunnels a credential has."""
        return sum(one == owner for one in self._owners.values())

    def _enter(self, tunnel: Tunnel, owner: str) -> None:
        self._tunnels[tunnel.id] = tunnel
        self._owners[tunnel.id] = owner
        self._ended.pop(tunnel.server_uri, None)  # that of a plain tcp tunnel may be one's before

    def _end_on_purpose(self, tunnel: Tunnel, done: str, grant: Grant, *, again: bool = False) -> str:
        """Somebody with this grant ends it, which its agent is not to undo unless it may be opened `again`. Returns
        why, for people.
        """
        why = f"{done} by request" + (f" of {grant.name}" if grant.name else "")
        if not again:
            self._ended[tunnel.server_uri] = self._owners[tunnel.id], f"tunnel {tunnel.id} was {why}"
            if len(self._ended) > MAX_ENDED:
                del self._ended[next(iter(self._ended))]
        return why

    def _remove(self, tunnel: Tunnel) -> None:
        """Only what it has counted stays."""
        del self._tunnels[tunnel.id]
        del self._owners[tunnel.id]
        (up, down), (more_up, more_down) = self._past_octets, tunnel.octets
        self._past_octets = up + more_up, down + more_down
        self._past_served += tunnel.served
        self._past_refusals += tunnel.refusals

    @property
    def _past(self) -> ServiceCounters:
        """For the next process."""
        refusals = {kind.value: count for kind, count in self._past_refusals.items()}
        return ServiceCounters(self._last_id, self.opened, self._past_octets, self._past_served, refusals)

    def _resume(self, past: ServiceCounters) -> None:
        """Go on where another process was."""
        self._last_id, self.opened = past.last_id, past.opened
        self._past_octets, self._past_served = past.octets, past.served
        self._past_refusals = Counter({RefusalKind(kind): count for kind, count in past.refusals.items()})


FREE = frozenset({"name", "client_port", "replace", "ttl"})
"""Options that are looked at otherwise, or not at all: agents count their ttl down, and the first one's holds."""


def check_agrees(tunnel: Tunnel, backend: str, options: TunnelOptions, asked: TunnelOptions) -> None:
    """Raise `UsageError` where an option that was `asked` for contradicts those of the open tunnel. `options` is what a
    grant made of them; one that was left out agrees with everything.
    """
    theirs, nothing = tunnel.spec.options, TunnelOptions()
    if backend != tunnel.spec.backend:
        raise _contradiction(tunnel, f"backend {tunnel.spec.backend}", f"backend {backend}")
    port = tunnel.client_uri.port
    if asked.client_port not in {None, port}:
        raise _contradiction(tunnel, f"client_port={port}", f"client_port={asked.client_port}")
    for field in fields(asked):
        name = field.name
        if name in FREE or getattr(asked, name) == getattr(nothing, name):
            continue
        wanted, there = getattr(options, name), getattr(theirs, name)
        if wanted != there:
            raise _contradiction(
                tunnel, f"{name}={_shown(there)}" if there else f"no {name}", f"{name}={_shown(wanted)}"
            )


def _contradiction(tunnel: Tunnel, there: str, wanted: str) -> UsageError:
    name = tunnel.spec.options.name
    return UsageError(
        f"tunnel {name!r} is shared and open with {there}, which {wanted} contradicts: ask for the same or leave it out"
    )


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
