"""What a credential may do. Pure: authentication happens elsewhere, and decides which grant a requester has.

    role     may
    user     open tunnels, as its grant allows; see, close, drain, trim and watch the tunnels that it opened
    viewer   see all tunnels, but not the keys in their server URIs; ask for status and metrics; change nothing
    admin    everything, for all tunnels; also reload and shut down

A tunnel belongs to the credential that opened it, by name. Every other credential except an admin or a viewer is told
that the tunnel does not exist.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from tunneld.errors import LimitReachedError, NotAllowedError, UsageError
from tunneld.net.endpoint import Network, contains, parse_network
from tunneld.policy.options import ANYWHERE, TunnelOptions, parse_bytes, parse_count, parse_seconds


class Role(Enum):
    """What a credential is for."""

    USER = "user"
    VIEWER = "viewer"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Grant:
    """What one credential may do. None means: no limit but the relay's own."""

    name: str  # of the credential
    role: Role = Role.USER
    backends: tuple[str, ...] | None = None
    ports: tuple[range, ...] | None = None  # that it may request with client_port
    bind: tuple[Network, ...] | None = None  # where the addresses lie that it may request with bind; None: none
    networks: tuple[Network, ...] | None = None  # that it may be used from
    names: tuple[str, ...] | None = None  # patterns of host names, see `names.check_name`; None: see there
    visit: tuple[str, ...] | None = None  # patterns of private tunnels that it may ask for; None: all
    server_from: tuple[Network, ...] | None = None  # that hidden servers of its tunnels may connect from
    max_tunnels: int | None = None
    max_visitors: int | None = None  # per tunnel
    max_ttl: float | None = None  # seconds; also the default of its tunnels
    bandwidth: int | None = None  # bytes per second, per tunnel; also the default
    quota: int | None = None  # bytes, per tunnel; also the default
    max_total_visitors: int | None = None  # of all its tunnels
    total_bandwidth: int | None = None  # bytes per second, of all its tunnels

    @property
    def is_admin(self) -> bool:
        """Whether it may do everything."""
        return self.role is Role.ADMIN

    @property
    def sees_all(self) -> bool:
        """Whether it may see the tunnels of all credentials."""
        return self.role is not Role.USER

    @property
    def view(self) -> Grant:
        """A grant that sees the same tunnels, and is equal for all credentials that do."""
        return Grant("" if self.sees_all else self.name, self.role)

    @property
    def title(self) -> str:
        """How messages name it: `credential 'home'`."""
        return f"credential {self.name!r}"

    def by_request(self, action: str) -> str:
        """A reason, such as `closed by request of home`."""
        return f"{action} by request" + (f" of {self.name}" if self.name else "")

    def may_see(self, owner: str) -> bool:
        """Whether it may see a tunnel of the credential `owner`: its own, or any for an admin or a viewer."""
        return self.sees_all or self.name == owner

    def admits(self, host: str) -> bool:
        """Whether the credential may be used from the address `host`."""
        if self.networks is None:
            return True
        try:
            return any(contains(network, (host, 0)) for network in self.networks)
        except ValueError:  # no IP address: a Unix socket, or a peer that has disconnected
            return False


@dataclass(frozen=True, slots=True)
class GrantLimit:
    """One row of `GRANT_LIMITS`: how `tunnel credential add` reads the value, what it accepts, and what it limits."""

    read: Callable[[str], Any]  # raises `ValueError`
    takes: str
    summary: str
    is_list: bool = False


GRANT_LIMITS: dict[str, GrantLimit] = {
    "backends": GrantLimit(str, "NAME", "backend that it may use", is_list=True),
    "ports": GrantLimit(str, "RANGE", "port or range of ports that it may request", is_list=True),
    "bind": GrantLimit(str, "NETWORK", "address or network of the relay that it may request for a port", is_list=True),
    "networks": GrantLimit(str, "NETWORK", "network from which it may be used", is_list=True),
    "names": GrantLimit(str, "PATTERN", "host name that its tunnels may have, such as blog or alice-*", is_list=True),
    "visit": GrantLimit(str, "PATTERN", "private tunnel that it may visit, such as shell@* or *@ID", is_list=True),
    "server_from": GrantLimit(str, "NETWORK", "network from which its agents may connect", is_list=True),
    "max_tunnels": GrantLimit(parse_count, "COUNT", "maximum number of open tunnels"),
    "max_visitors": GrantLimit(parse_count, "COUNT", "maximum number of visitors of each tunnel at a time"),
    "max_ttl": GrantLimit(parse_seconds, "SECONDS", "maximum lifetime of each tunnel"),
    "bandwidth": GrantLimit(parse_bytes, "BYTES[k|M|G|T]", "maximum number of bytes per second of each tunnel"),
    "quota": GrantLimit(parse_bytes, "BYTES[k|M|G|T]", "maximum number of bytes that each tunnel may relay"),
    "max_total_visitors": GrantLimit(parse_count, "COUNT", "maximum number of visitors of all its tunnels at a time"),
    "total_bandwidth": GrantLimit(
        parse_bytes, "BYTES[k|M|G|T]", "maximum number of bytes per second of all its tunnels together"
    ),
}
"""The limits of a grant: keys of [[credential]], fields of `Grant`, and flags of `tunnel credential add`."""

EVERYBODY = Grant("", Role.ADMIN)
"""The grant of every peer on a relay without credentials, which listens only where its operator can connect."""


def check_role(grant: Grant | None, needed: Role | None, verb: str, *, changes: bool) -> None:
    """Raise `NotAllowedError` unless `grant` may use the verb. `needed` is the role that the verb requires, USER or
    ADMIN; None: it requires no authentication. `changes`: whether the verb changes anything.

    `grant` is None for a peer that has not authenticated, or has lost its credential.
    """
    if needed is None:
        return
    if grant is None:
        raise NotAllowedError(f"{verb} requires authentication: see help auth")
    if grant.role is Role.VIEWER:
        if changes:
            raise NotAllowedError(f"{verb} is not allowed: {grant.title} has the role viewer, which changes nothing")
        return
    if needed is Role.ADMIN and not grant.is_admin:
        raise NotAllowedError(f"{verb} requires the role admin: {grant.title} has the role {grant.role.value}")


def permit(grant: Grant, backend: str, options: TunnelOptions, host: str, opened: int) -> TunnelOptions:
    """Check a request to open a tunnel against a grant, and return its options with `server_from` bounded by it. The
    numeric limits of the grant are resolved by `limits.effective_limits`.

    `host` is the requester's address, `opened` the number of open tunnels of the credential.
    Raises `NotAllowedError` or `LimitReachedError`.
    """
    if grant.role is Role.VIEWER:
        raise NotAllowedError(f"{grant.title} has the role viewer, which opens no tunnels; use one with the role user")
    if grant.backends is not None and backend not in grant.backends:
        raise NotAllowedError(f"{grant.title} may not use the backend {backend!r}, only {', '.join(grant.backends)}")
    for port in options.requested_ports:
        _check_port(grant, port)
    _check_bind(grant, options.bind)
    options = bound_server_from(grant, options, host)
    if grant.max_tunnels is not None and opened >= grant.max_tunnels:
        raise LimitReachedError(
            f"tunnel limit reached: {grant.title} has {opened} of {grant.max_tunnels} open (max_tunnels)"
        )
    return options


def bound_server_from(grant: Grant, options: TunnelOptions, host: str) -> TunnelOptions:
    """The options with `server_from` inside the grant's networks, for a requester at `host`. Raises `NotAllowedError`
    where it is outside.
    """
    if grant.server_from is not None and options.server_from is None:
        options = replace(options, server_from=_network(host))  # also where a key would allow any address
    _check_server_from(grant, options, host)
    return options


def _check_port(grant: Grant, port: int) -> None:
    if grant.ports is None or any(port in ports for ports in grant.ports):
        return
    raise NotAllowedError(f"{grant.title} may not use public port {port}, only {_ports(grant.ports)} (client_port)")


def _check_bind(grant: Grant, address: str) -> None:
    """Admins may bind any address that the relay listens at, others only the ones that they are given."""
    if not address or (grant.bind is None and grant.is_admin):
        return
    if not any(contains(network, (address, 0)) for network in grant.bind or ()):
        allowed = f"only addresses in {', '.join(map(str, grant.bind))}" if grant.bind else "the relay chooses it"
        raise NotAllowedError(f"{grant.title} may not use the address {address}, {allowed} (bind)")


def _check_server_from(grant: Grant, options: TunnelOptions, host: str) -> None:
    """The sources of server connections must be inside the grant's networks, the requester's own address included."""
    if grant.server_from is None:
        return
    requested = options.server_from
    if (
        requested is not None
        and requested != ANYWHERE
        and any(_within(requested, ceiling) for ceiling in grant.server_from)
    ):
        return
    allowed = ", ".join(map(str, grant.server_from))
    raise NotAllowedError(
        f"{grant.title} may open tunnels only for servers at {allowed}, not at {requested or host} (server_from)"
    )


def _network(host: str) -> Network | None:
    try:
        return parse_network(host)
    except UsageError:
        return None  # no IP address: a peer that has disconnected


def _within(network: Network, ceiling: Network) -> bool:
    match network, ceiling:
        case ipaddress.IPv4Network(), ipaddress.IPv4Network():
            return network.subnet_of(ceiling)
        case ipaddress.IPv6Network(), ipaddress.IPv6Network():
            return network.subnet_of(ceiling)
    return False


def _ports(ranges: Sequence[range]) -> str:
    return ", ".join(f"{ports[0]}-{ports[-1]}" if len(ports) > 1 else str(ports[0]) for ports in ranges)
