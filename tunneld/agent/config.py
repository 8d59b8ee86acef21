"""What the user configured for one exposure, from the options of a command or a table of a file. No I/O.

Values are looked up by key: `max_pool`. `spell` turns a key into what the user wrote: `--max-pool` or `max_pool`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tunneld.agent.health import Check, UnhealthyPolicy
from tunneld.agent.pool import PoolLimits
from tunneld.agent.request import TunnelRequest
from tunneld.agent.shutdown import DRAIN_WITHIN
from tunneld.errors import UsageError
from tunneld.net.endpoint import Target
from tunneld.policy.options import OPTIONS

OPTION_KEYS = ("secure", "linger", *(key for key, option in OPTIONS.items() if option.group))
"""Keys that are options of openTunnel. The agent itself acts on `secure` and `linger`; it only passes the others on."""


@dataclass(frozen=True, slots=True)
class ExposureConfig:
    """What the user configured for one exposure. `linger` and `drain_timeout` are seconds, `scheme` is that of the
    address that is shown.
    """

    target: Target
    request: TunnelRequest = field(default_factory=TunnelRequest)
    check: Check | None = None
    scheme: str = "tcp"
    linger: float = 60.0
    drain_timeout: float = DRAIN_WITHIN


def plan_of(values: Mapping[str, Any], spell: Callable[[str], str]) -> ExposureConfig:
    """Build the configuration of an exposure from values by key; None means not given. Raises `UsageError`."""
    if values["pool"] > values["max_pool"]:
        raise UsageError(f"{spell('pool')} {values['pool']} is more than {spell('max_pool')} {values['max_pool']}")
    if values["share"] and not values["name"]:
        raise UsageError(f"{spell('share')} requires {spell('name')}: agents that give the same name share the tunnel")
    options = {key: values[key] for key in OPTION_KEYS if values[key] not in {None, False}}
    limits = PoolLimits(values["pool"], values["max_pool"])
    request = TunnelRequest(options, limits, keep_header=values["proxy_protocol"], backend=values["backend"])
    return ExposureConfig(
        Target.parse(values["target"]),
        request,
        _health_check(values),
        values["scheme"] or "tcp",
        values["linger"],
        values["drain_timeout"],
    )


def _health_check(values: Mapping[str, Any]) -> Check | None:
    """The health check that the values ask for, or None."""
    if values["health"] is None:
        return None
    return Check(
        values["health"],
        values["health_path"],
        values["health_interval"],
        values["health_timeout"],
        values["unhealthy_after"],
        values["healthy_after"],
        UnhealthyPolicy(values["unhealthy"]),
    )


@dataclass(frozen=True, slots=True)
class Changes:
    """The difference between two sets of exposures, by name."""

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()


def changes(old: Mapping[str, object], new: Mapping[str, object]) -> Changes:
    """Which names to open, to close, and to close and open again. Names in none of the three are unchanged."""
    return Changes(
        added=tuple(name for name in new if name not in old),
        removed=tuple(name for name in old if name not in new),
        replaced=tuple(name for name in new if name in old and old[name] != new[name]),
    )
