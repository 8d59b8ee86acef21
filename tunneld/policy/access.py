"""Who may do what, and how much of it. Pure: decisions about facts, no question about who somebody is.

    role     may
    user     open tunnels, as its grant allows; see, close, drain, trim and watch those that it opened
    admin    that, for everybody's tunnels; ask for the status, reload, shut down

A tunnel belongs to the credential that opened it, by name. To everybody else but admins it does not exist.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import TypeVar

from tunneld.errors import LimitReachedError, NotAllowedError, UsageError
from tunneld.net.endpoint import Network, contains, parse_network
from tunneld.policy.options import ANYWHERE, TunnelOptions

_Number = TypeVar("_Number", int, float)


class Role(Enum):
    """What a credential is for."""

    USER = "user"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Grant:
    """What one credential may do; None means that nothing beyond the relay's own limits bounds it."""

    name: str
    role: Role = Role.USER
    backends: tuple[str, ...] | None = None
    ports: tuple[range, ...] | None = None  # that it may ask for with client_port
    networks: tuple[Network, ...] | None = None  # that it may come from
    server_from: tuple[Network, ...] | None = None  # that its hidden servers may come from
    max_tunnels: int | None = None
    max_visitors: int | None = None  # of each tunnel
    max_ttl: float | None = None  # seconds, and what a tunnel gets that asks for none
    bandwidth: int | None = None  # octets per second, of each tunnel, and what one gets that asks for none
    quota: int | None = None  # octets, the same

    @property
    def is_admin(self) -> bool:
        """Whether it may do everything."""
        return self.role is Role.ADMIN

    def admits(self, host: str) -> bool:
        """Whether it may be used from the address `host`."""
        if self.networks is None:
            return True
        try:
            return any(contains(network, (host,)) for network in self.networks)
        except ValueError:  # no address: a Unix socket, or a peer that left
            return False


EVERYBODY = Grant("", Role.ADMIN)
"""Whoever speaks to a relay without credentials: it listens where only its operator can reach it."""


def check_role(grant: Grant | None, needed: Role | None, verb: str) -> None:
    """Raise `NotAllowedError` unless the verb may be used: `needed` is the role it takes, None if not even a name.

    `grant` is None for somebody who has not authenticated (any more).
    """
    if needed is None:
        return
    if grant is None:
        raise NotAllowedError(f"{verb} is not for strangers: authenticate first, see help auth")
    if needed is Role.ADMIN and not grant.is_admin:
        raise NotAllowedError(f"{verb} is for admins, and {_who(grant)} has the role {grant.role.value}")


def permit(grant: Grant, backend: str, options: TunnelOptions, asker: str, opened: int) -> TunnelOptions:
    """What the tunnel that is asked for becomes under a grant: the options with its ttl, bandwidth and quota bounded.

    `asker` is the address that asks, `opened` how many tunnels of this credential are open.
    Raises `NotAllowedError` or `LimitReachedError`.
    """
    if grant.backends is not None and backend not in grant.backends:
        raise NotAllowedError(f"{_who(grant)} may open tunnels of {', '.join(grant.backends)}, not of {backend!r}")
    _check_port(grant, options.client_port)
    options = bound_hidden(grant, options, asker)
    if grant.max_tunnels is not None and opened >= grant.max_tunnels:
        raise LimitReachedError(f"could not open a tunnel: {opened} of {_who(grant)} are open (its max_tunnels)")
    return replace(
        options,
        ttl=least(options.ttl, grant.max_ttl),
        bandwidth=least(options.bandwidth, grant.bandwidth),
        quota=least(options.quota, grant.quota),
    )


def bound_hidden(grant: Grant, options: TunnelOptions, asker: str) -> TunnelOptions:
    """The options with what a grant says of where hidden servers may come from. Raises `NotAllowedError`."""
    if grant.server_from is not None and options.server_from is None:
        options = replace(options, server_from=_network(asker))  # also where a key would let it come from anywhere
    _check_server_from(grant, options, asker)
    return options


def least(wanted: _Number | None, ceiling: _Number | None) -> _Number | None:
    """The smaller of two limits, of which either may be none."""
    return min((each for each in (wanted, ceiling) if each is not None), default=None)


def _check_port(grant: Grant, port: int | None) -> None:
    if port is None or grant.ports is None or any(port in ports for ports in grant.ports):
        return
    raise NotAllowedError(f"{_who(grant)} may not ask for client_port={port}, only for {_ports(grant.ports)}")


def _check_server_from(grant: Grant, options: TunnelOptions, asker: str) -> None:
    """Whoever may be the hidden server must be inside the ceiling, also where it is the asker by default."""
    if grant.server_from is None:
        return
    wanted = options.server_from
    if wanted is not None and wanted != ANYWHERE and any(_within(wanted, ceiling) for ceiling in grant.server_from):
        return
    allowed = ", ".join(map(str, grant.server_from))
    raise NotAllowedError(f"hidden servers of {_who(grant)} may come from {allowed}, not from {wanted or asker}")


def _network(asker: str) -> Network | None:
    try:
        return parse_network(asker)
    except UsageError:
        return None  # no address: a peer that left


def _within(network: Network, ceiling: Network) -> bool:
    match network, ceiling:
        case ipaddress.IPv4Network(), ipaddress.IPv4Network():
            return network.subnet_of(ceiling)
        case ipaddress.IPv6Network(), ipaddress.IPv6Network():
            return network.subnet_of(ceiling)
    return False


def _ports(ranges: Sequence[range]) -> str:
    return ", ".join(f"{ports[0]}-{ports[-1]}" if len(ports) > 1 else str(ports[0]) for ports in ranges)


def _who(grant: Grant) -> str:
    return f"credential {grant.name!r}"
