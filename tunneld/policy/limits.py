"""The limits of one tunnel, from the relay's configuration, the credential's grant and the options of openTunnel.

    max_visitors     the option, refused above the ceiling: the smaller of grant and configuration; default the ceiling
    max_per_source   the option, refused above the configured ceiling; default the ceiling
    visitor_rate     the same
    bandwidth        the smallest of option, grant and configuration
    quota            the same
    ttl              the smaller of option and grant
    pairing_timeout  the option; default the configuration
    open_timeout     the same
    linger           the same
    idle_timeout     the option; default none

A refusal names the option. Bandwidth, quota and ttl are lowered without an error: an agent cannot know the ceilings,
and a slower tunnel is more useful than none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from tunneld.errors import UsageError
from tunneld.net.endpoint import Network, parse_network
from tunneld.policy.access import Grant
from tunneld.policy.admission import Rules
from tunneld.policy.options import TunnelOptions
from tunneld.policy.rates import Rate
from tunneld.wire.proxy_protocol import SocketAddress, encode_v1, encode_v2

ProxyHeader = Callable[[SocketAddress | None, SocketAddress | None], bytes]
"""Encodes a header from the visitor's address and the one that it connected to."""

PROXY_HEADERS: dict[str, ProxyHeader] = {"v1": encode_v1, "v2": encode_v2}

_Number = TypeVar("_Number", int, float)


class TunnelCeilings(Protocol):
    """What `effective_limits` reads of the configuration's [tunnels]. Times are in seconds."""

    @property
    def max_visitors(self) -> int:
        """Connected visitors of a tunnel."""

    @property
    def max_waiting(self) -> int:
        """Visitors of a tunnel that wait for a server connection."""

    @property
    def max_per_source(self) -> int | None:
        """Visitors from one source, connected or waiting."""

    @property
    def visitor_rate(self) -> str | None:
        """New visitors from one source, as `Rate.parse` reads it."""

    @property
    def max_sources(self) -> int:
        """Sources that a tunnel remembers."""

    @property
    def allow_from(self) -> tuple[str, ...]:
        """Networks that visitors may connect from; empty: any."""

    @property
    def deny_from(self) -> tuple[str, ...]:
        """Networks that visitors may not connect from."""

    @property
    def pairing_timeout(self) -> float:
        """How long a visitor waits for a server connection."""

    @property
    def open_timeout(self) -> float:
        """How long a tunnel stays open without a connection."""

    @property
    def linger(self) -> float:
        """How long a half-closed connection may be silent."""

    @property
    def bandwidth(self) -> int | None:
        """Bytes per second of a tunnel."""

    @property
    def quota(self) -> int | None:
        """Bytes of a tunnel in its life."""


@dataclass(frozen=True, slots=True)
class EffectiveLimits:
    """What holds for one tunnel and each of its visitors. Times are in seconds; None: no limit."""

    persist: bool  # False: the tunnel serves one visitor
    rules: Rules
    max_visitors: int
    max_waiting: int
    pairing_timeout: float
    open_timeout: float
    idle_timeout: float | None
    ttl: float | None
    linger: float
    bandwidth: int | None  # bytes per second
    quota: int | None  # bytes
    proxy_header: ProxyHeader | None
    hide_visitor: bool

    def bound(self, options: TunnelOptions) -> TunnelOptions:
        """The options with these limits written into them. With them, a process that has no grant any more (after a
        restart) computes the same limits again.
        """
        return replace(
            options, max_visitors=self.max_visitors, ttl=self.ttl, bandwidth=self.bandwidth, quota=self.quota
        )


def effective_limits(settings: TunnelCeilings, grant: Grant, options: TunnelOptions) -> EffectiveLimits:
    """Resolve all limits of a tunnel. Raises `UsageError`, which names the option, where one exceeds its ceiling."""
    max_visitors, limited_by = settings.max_visitors, "this relay"
    if grant.max_visitors is not None and grant.max_visitors < max_visitors:
        max_visitors, limited_by = grant.max_visitors, grant.title
    _check_ceiling("max_visitors", options.max_visitors, max_visitors, limited_by)
    return EffectiveLimits(
        persist=options.persist,
        rules=_rules(settings, options),
        max_visitors=options.max_visitors or max_visitors,
        max_waiting=settings.max_waiting,
        pairing_timeout=options.pairing_timeout or settings.pairing_timeout,
        open_timeout=options.open_timeout or settings.open_timeout,
        idle_timeout=options.idle_timeout,
        ttl=_smallest(options.ttl, grant.max_ttl),
        linger=options.linger or settings.linger,
        bandwidth=_smallest(options.bandwidth, grant.bandwidth, settings.bandwidth),
        quota=_smallest(options.quota, grant.quota, settings.quota),
        proxy_header=PROXY_HEADERS[options.proxy_protocol] if options.proxy_protocol else None,
        hide_visitor=options.hide_visitor,
    )


def _rules(settings: TunnelCeilings, options: TunnelOptions) -> Rules:
    """What a visitor has to meet before it is accepted."""
    _check_ceiling("max_per_source", options.max_per_source, settings.max_per_source, "this relay")
    ceiling = Rate.parse(settings.visitor_rate) if settings.visitor_rate is not None else None
    if options.visitor_rate and ceiling and not options.visitor_rate.within(ceiling):
        raise UsageError(
            f"option visitor_rate={options.visitor_rate} exceeds the limit of this relay: {ceiling}, both at once and "
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


def _check_ceiling(option: str, requested: int | None, ceiling: int | None, limited_by: str) -> None:
    if requested is not None and ceiling is not None and requested > ceiling:
        raise UsageError(f"option {option}={requested} exceeds the limit of {limited_by}: {ceiling}")


def _smallest(*limits: _Number | None) -> _Number | None:
    """The smallest of limits, where None is no limit."""
    return min((limit for limit in limits if limit is not None), default=None)


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """The limits of one connection."""

    max_head: int = 32768  # bytes of the head of a request or response
    head_timeout: float = 10.0  # seconds, for a complete head
    keep_alive_timeout: float = 75.0  # seconds between two requests
    response_timeout: float = 0.0  # seconds until the head of a response; 0: no limit, for long polls
