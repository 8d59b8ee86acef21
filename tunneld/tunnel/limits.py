"""The terms of a tunnel: what its options and the configuration come to together, worked out once, when it opens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tunneld.config.schema import TunnelSettings
from tunneld.errors import UsageError
from tunneld.net.endpoint import Network, parse_network
from tunneld.policy.access import least
from tunneld.policy.admission import Rules
from tunneld.policy.options import TunnelOptions
from tunneld.policy.rates import Rate
from tunneld.wire.proxy_protocol import SocketAddress, encode_v1, encode_v2

ProxyHeader = Callable[[SocketAddress | None, SocketAddress | None], bytes]
"""Of a visitor's address and ours."""

PROXY_HEADERS: dict[str, ProxyHeader] = {"v1": encode_v1, "v2": encode_v2}


@dataclass(frozen=True, slots=True)
class EffectiveLimits:
    """What holds for every visitor of one tunnel."""

    persist: bool  # False: for one visitor
    rules: Rules
    max_visitors: int
    max_waiting: int
    pairing_timeout: float  # seconds
    linger: float  # seconds
    bandwidth: int | None  # octets per second
    quota: int | None  # octets
    proxy_header: ProxyHeader | None
    hide_visitor: bool

    @classmethod
    def of(cls, settings: TunnelSettings, options: TunnelOptions) -> EffectiveLimits:
        """Raises `UsageError` where an option exceeds what is configured."""
        return cls(
            persist=options.persist,
            rules=_rules(settings, options),
            max_visitors=options.max_visitors or settings.max_visitors,
            max_waiting=settings.max_waiting,
            pairing_timeout=options.pairing_timeout or settings.pairing_timeout,
            linger=options.linger or settings.linger,
            bandwidth=least(options.bandwidth, settings.bandwidth),
            quota=least(options.quota, settings.quota),
            proxy_header=PROXY_HEADERS[options.proxy_protocol] if options.proxy_protocol else None,
            hide_visitor=options.hide_visitor,
        )


def _rules(settings: TunnelSettings, options: TunnelOptions) -> Rules:
    """What is asked of visitors at the door."""
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
