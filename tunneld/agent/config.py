"""What is wanted of one exposure, wherever that was written: as options of a command, as a table of a file. Pure.

A written value is found under one word, `max_pool`. How the word is spelled for the person who wrote it (`--max-pool`)
is the business of `spell`.
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

OPTIONS = ("name", "share", "secure", "client_port", "ttl", "idle_timeout", "pairing_timeout", "linger")
"""Words that openTunnel has as well."""
VISITORS = ("allow_from", "deny_from", "max_visitors", "max_per_source", "visitor_rate", "bandwidth", "quota")
"""The same for those about visitors; on a command line they go to the relay as typed, and it says what is wrong."""


@dataclass(frozen=True, slots=True)
class ExposureConfig:
    """One exposure. `linger` and `drain_timeout` in seconds."""

    target: Target
    request: TunnelRequest = field(default_factory=TunnelRequest)
    check: Check | None = None
    scheme: str = "tcp"  # of the address that is told
    linger: float = 60.0
    drain_timeout: float = DRAIN_WITHIN


def plan_of(words: Mapping[str, Any], spell: Callable[[str], str]) -> ExposureConfig:
    """Make a plan of what was written; None stands for what was not. Raises `UsageError`."""
    if words["pool"] > words["max_pool"]:
        raise UsageError(f"{spell('pool')} {words['pool']} is more than {spell('max_pool')} {words['max_pool']}")
    options = {key: words[key] for key in (*OPTIONS, *VISITORS) if words[key] not in {None, False}}
    if words["share"] and not words["name"]:
        raise UsageError(f"{spell('share')} goes with {spell('name')}: others join by it")
    limits = PoolLimits(words["pool"], words["max_pool"])
    wish = TunnelRequest(options, limits, keep_header=words["proxy_protocol"], backend=words["backend"])
    return ExposureConfig(
        Target.parse(words["target"]),
        wish,
        check_of(words),
        words["scheme"] or "tcp",
        words["linger"],
        words["drain_timeout"],
    )


def check_of(words: Mapping[str, Any]) -> Check | None:
    """How the local server is to be looked at, if at all."""
    if words["health"] is None:
        return None
    return Check(
        words["health"],
        words["health_path"],
        words["health_interval"],
        words["health_timeout"],
        words["unhealthy_after"],
        words["healthy_after"],
        UnhealthyPolicy(words["unhealthy"]),
    )


@dataclass(frozen=True, slots=True)
class Changes:
    """From the plans that run to those that are wanted, by their names."""

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()


def changes(old: Mapping[str, object], new: Mapping[str, object]) -> Changes:
    """What to open, to close, and to close and open again; whoever is in none of them is left alone."""
    return Changes(
        added=tuple(name for name in new if name not in old),
        removed=tuple(name for name in old if name not in new),
        replaced=tuple(name for name in new if name in old and old[name] != new[name]),
    )
