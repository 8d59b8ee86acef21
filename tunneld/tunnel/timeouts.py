"""The times after which a tunnel closes by itself: open_timeout, ttl, idle_timeout."""

from __future__ import annotations

from typing import Protocol

import trio

IDLE_CHECKS = 8
"""Checks for activity per `idle_timeout`. A tunnel closes at most an eighth of it late, and idle tunnels cost next to
nothing.
"""


class TimedTunnel(Protocol):
    """What the timeouts read of a tunnel, and the one thing they do to it."""

    opened_at: float
    """When it was opened, in `trio.current_time`."""
    idle_since: float
    """When the last connection of either side ended, in `trio.current_time`."""
    idle_checks: int
    """Checks in a row that found no activity. Kept in the tunnel, so that it survives a restart of the daemon."""

    @property
    def in_use(self) -> bool:
        """Whether a connection stands on either side."""

    @property
    def activity(self) -> object:
        """A value that changes whenever a byte was relayed or a visitor was joined."""

    def close(self, reason: str) -> None:
        """Close now."""

    def expire(self, reason: str) -> None:
        """Close now and for good."""


async def close_when_unused(tunnel: TimedTunnel, open_timeout: float) -> None:
    """Close the tunnel after `open_timeout` seconds without a connection."""
    while True:
        await trio.sleep_until(tunnel.idle_since + open_timeout)
        if tunnel.in_use:
            tunnel.idle_since = trio.current_time()
        elif trio.current_time() >= tunnel.idle_since + open_timeout:
            tunnel.close(f"no connection for {open_timeout:g} s (open_timeout)")


async def close_after(tunnel: TimedTunnel, ttl: float) -> None:
    """Close the tunnel `ttl` seconds after it was opened, even if it is in use."""
    await trio.sleep_until(tunnel.opened_at + ttl)
    tunnel.expire(f"lifetime of {ttl:g} s is over (ttl)")


async def close_when_idle(tunnel: TimedTunnel, idle_timeout: float) -> None:
    """Close the tunnel after `idle_timeout` seconds without a byte and without a new visitor."""
    last = tunnel.activity
    while tunnel.idle_checks < IDLE_CHECKS:
        await trio.sleep(idle_timeout / IDLE_CHECKS)
        activity = tunnel.activity
        tunnel.idle_checks = tunnel.idle_checks + 1 if activity == last else 0
        last = activity
    tunnel.expire(f"no data for {idle_timeout:g} s (idle_timeout)")
