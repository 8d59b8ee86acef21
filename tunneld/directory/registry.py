"""Which tunnels are open, which credential owns each, and the counters of tunnels that have closed.

This is all that a service knows of tunnels; several machines would share it here. `check_agrees` tells whether the
options of an agent fit the shared tunnel that it is to serve.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import fields

from tunneld.errors import EndedError, ExpiredError, NoSuchTunnelError, TunneldError, UsageError
from tunneld.net.endpoint import Endpoint
from tunneld.policy.access import EVERYBODY, Grant
from tunneld.policy.admission import RefusalKind
from tunneld.policy.limits import effective_limits
from tunneld.policy.options import TunnelOptions, format_option
from tunneld.policy.reservations import ReservationKey
from tunneld.tunnel.snapshot import ServiceCounters
from tunneld.tunnel.tunnel import Phase, Tunnel

MAX_ENDED = 1024
"""Tunnels that have ended for good, by request or by a limit, whose reason is remembered, at about 300 bytes each. An
agent asks within seconds, or once it is reconnected. For a forgotten tunnel it is told that there is none, and opens
another.
"""


class TunnelRegistry:
    """The tunnels of a process, open or opening."""

    def __init__(self) -> None:
        self.opened = 0  # tunnels since the first process
        self._last_id = 0
        self._tunnels: dict[str, Tunnel] = {}  # by id, oldest first
        self._owners: dict[str, str] = {}  # by tunnel id: the name of the credential
        self._holders: dict[str, ReservationKey] = {}  # by tunnel id: the holder of its address, if it has a name
        self._ended: dict[Endpoint, tuple[str, TunneldError]] = {}  # by server URI: credential, and why it has ended
        self._past_octets = (0, 0)  # bytes of tunnels that have closed: up, down
        self._past_served = 0
        self._past_refusals = Counter[RefusalKind]()

    # Finding tunnels

    def tunnels(self, grant: Grant = EVERYBODY) -> Sequence[Tunnel]:
        """The open tunnels that this grant may see, oldest first."""
        return [tunnel for tunnel in self._tunnels.values() if self.is_of(grant, tunnel.id)]

    def is_of(self, grant: Grant, tunnel: str) -> bool:
        """Whether this grant may see the tunnel with this id: its own, or any for an admin."""
        return grant.is_admin or grant.name == self._owners.get(tunnel)

    def owner_of(self, tunnel: str) -> str:
        """The name of the credential that opened the tunnel with this id; empty where there are no credentials."""
        return self._owners[tunnel]

    def find(self, reference: str, grant: Grant = EVERYBODY) -> Tunnel:
        """The tunnel with this id, server URI, client URI or client port.

        Raises `NoSuchTunnelError`, also for a tunnel of another credential, or `EndedError` or `ExpiredError` where the
        server URI is that of a tunnel that has ended for good.
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
                f"no open tunnel is called {reference!r}: use an id, a URI or a port as list shows it"
            )
        return tunnel

    def get_tunnel_address(self, uri: str, grant: Grant = EVERYBODY) -> Endpoint:
        """The public address for a server URI.

        Raises `NoSuchTunnelError`, also for a tunnel that is draining, `EndedError` or `ExpiredError` for one that has
        ended for good, or `UsageError` where `uri` is no URI.
        """
        endpoint = Endpoint.parse(uri.strip())
        tunnel = self._newest(lambda one: one.server_uri == endpoint)
        if tunnel is None or tunnel.phase is Phase.DRAINING:
            self._check_not_ended(endpoint, grant)
        if tunnel is None or not self.is_of(grant, tunnel.id):
            raise NoSuchTunnelError(f"no open tunnel has the server URI {endpoint.without_key}")
        if tunnel.phase is Phase.DRAINING:
            raise NoSuchTunnelError(f"tunnel {tunnel.id} is draining and accepts no new visitors")
        return tunnel.client_uri

    def current_of(self, holder: ReservationKey | None) -> Tunnel | None:
        """The tunnel that has this holder's address and is not draining, if any."""
        return next((tunnel for tunnel in self.all_of(holder) if tunnel.phase is not Phase.DRAINING), None)

    def all_of(self, holder: ReservationKey | None) -> Sequence[Tunnel]:
        """All tunnels of this holder, draining ones included, oldest first."""
        return [tunnel for tunnel in self._tunnels.values() if holder and self._holders.get(tunnel.id) == holder]

    @property
    def count(self) -> int:
        """How many tunnels are open or opening."""
        return len(self._tunnels)

    def count_of(self, owner: str) -> int:
        """How many tunnels a credential has."""
        return sum(one == owner for one in self._owners.values())

    def ports_of(self, owner: str) -> set[int]:
        """The ports of the open tunnels of a credential; a port that tunnels share may be among them."""
        tunnels = (self._tunnels[tunnel] for tunnel, one in self._owners.items() if one == owner)
        return {port for tunnel in tunnels for port in (tunnel.client_uri.port, tunnel.server_uri.port)}

    # Counters

    @property
    def octets(self) -> tuple[int, int]:
        """Bytes delivered since the start, by all tunnels: up, down."""
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
        """Visitors refused since the start, by the class of the reason."""
        return sum((tunnel.refusals for tunnel in self._tunnels.values()), self._past_refusals)

    @property
    def past(self) -> ServiceCounters:
        """The counters of tunnels that have closed, for the next process."""
        refusals = {kind.value: count for kind, count in self._past_refusals.items()}
        return ServiceCounters(self._last_id, self.opened, self._past_octets, self._past_served, refusals)

    def continue_from(self, past: ServiceCounters) -> None:
        """Continue the counters of another process."""
        self._last_id, self.opened = past.last_id, past.opened
        self._past_octets, self._past_served = past.octets, past.served
        self._past_refusals = Counter({RefusalKind(kind): count for kind, count in past.refusals.items()})

    # Opening and closing, called by the service

    @property
    def next_id(self) -> str:
        """The id for the next tunnel; `add` uses it up."""
        return f"t{self._last_id + 1}"

    def add(self, tunnel: Tunnel, owner: str, holder: ReservationKey | None = None, *, adopted: bool = False) -> None:
        """Add a tunnel of the credential `owner`. `holder` holds its address, where it has a name. One that is
        `adopted` from another process has been counted there.
        """
        if not adopted:
            self._last_id += 1
            self.opened += 1
        self._tunnels[tunnel.id] = tunnel
        self._owners[tunnel.id] = owner
        if holder is not None:
            self._holders[tunnel.id] = holder
        self._ended.pop(tunnel.server_uri, None)  # a plain tcp tunnel may get the server URI of an ended one

    def remove(self, tunnel: Tunnel) -> None:
        """Remove a tunnel that has closed, and keep its counters."""
        if tunnel.expired:
            self._note_ended(tunnel, ExpiredError(f"tunnel {tunnel.id} has ended: {tunnel.reason}"))
        del self._tunnels[tunnel.id]
        del self._owners[tunnel.id]
        self._holders.pop(tunnel.id, None)
        (up, down), (more_up, more_down) = self._past_octets, tunnel.octets
        self._past_octets = up + more_up, down + more_down
        self._past_served += tunnel.served
        self._past_refusals += tunnel.refusals

    def end_by_request(self, tunnel: Tunnel, action: str, grant: Grant, *, reopen: bool = False) -> str:
        """Note that this grant `closed` or `drained` a tunnel, so that its agent does not open it again, unless it may
        `reopen` it. Returns the reason as text.
        """
        reason = f"{action} by request" + (f" of {grant.name}" if grant.name else "")
        if not reopen:
            self._note_ended(tunnel, EndedError(f"tunnel {tunnel.id} was {reason}"))
        return reason

    def _note_ended(self, tunnel: Tunnel, error: TunneldError) -> None:
        """Remember why a tunnel has ended for good; `error` is raised for its agent."""
        self._ended.setdefault(tunnel.server_uri, (self._owners[tunnel.id], error))
        if len(self._ended) > MAX_ENDED:
            del self._ended[next(iter(self._ended))]

    def _newest(self, matches: Callable[[Tunnel], bool]) -> Tunnel | None:
        """Of several tunnels with an address the newest has it: the older ones are draining and gave it up."""
        return next(filter(matches, reversed(self._tunnels.values())), None)

    def _check_not_ended(self, server: Endpoint, grant: Grant) -> None:
        owner, error = self._ended.get(server, ("", None))
        if error is not None and (grant.is_admin or grant.name == owner):
            raise type(error)(str(error))


UNCOMPARED = frozenset({"name", "client_port", "replace", "ttl"})
"""Options that `check_agrees` compares in another way or not at all. Agents count their ttl down; the one with which
the tunnel was opened holds.
"""


def check_agrees(tunnel: Tunnel, backend: str, options: TunnelOptions, requested: TunnelOptions, grant: Grant) -> None:
    """Raise `UsageError` where an option that an agent `requested` contradicts the shared tunnel that it is to serve.
    An option that it left out agrees with every value. `options` are the requested ones as `permit` returned them; the
    limits of the grant are applied before the comparison, as they were when the tunnel was opened.
    """
    bound = effective_limits(tunnel.spec.settings, grant, options).bound(options)
    theirs, defaults = tunnel.spec.options, TunnelOptions()
    if backend != tunnel.spec.backend:
        raise _contradiction(tunnel, f"with backend {tunnel.spec.backend}", f"backend {backend}")
    port = tunnel.client_uri.port
    if options.client_port not in {None, port}:
        raise _contradiction(tunnel, f"with client_port={port}", f"client_port={options.client_port}")
    for field in fields(requested):
        name = field.name
        if name in UNCOMPARED or getattr(requested, name) == getattr(defaults, name):
            continue
        wanted, there = getattr(bound, name), getattr(theirs, name)
        if wanted != there:
            raise _contradiction(
                tunnel,
                f"with {name}={format_option(there)}" if there else f"without {name}",
                f"{name}={format_option(wanted)}",
            )


def _contradiction(tunnel: Tunnel, there: str, requested: str) -> UsageError:
    name = tunnel.spec.options.name
    return UsageError(
        f"shared tunnel {name!r} is open {there}, but {requested} was requested: use the same or leave it out"
    )
