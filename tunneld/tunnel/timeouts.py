"""The times after which a tunnel closes by itself: open_timeout, ttl, idle_timeout."""

from __future__ import annotations

from typing import Protocol

import trio

LOOKS = 8
"""How often idleness is looked at per `idle_timeout`: a tunnel closes at most an eighth of it late, and idle ones
cost next to nothing.
"""


class TimedTunnel(Protocol):
    """What the clocks read of a tunnel, and the one thing they do to it."""

    opened_at: float
    """When it was opened, in `trio.current_time`."""
    idle_since: float
    """When the last connection of either side went, in `trio.current_time`."""
    idle_checks: int
    """How many looks in a row found that nothing had happened; kept there, for whoever goes on with the tunnel."""

    @property
    def in_use(self) -> bool:
        """Whether anybody is connected on either side."""

    @property
    def activity(self) -> object:
        """Something that differs whenever a byte moved or a visitor came."""

    def close(self, reason: str) -> None:
        """Stop now."""


async def close_when_unused(tunnel: TimedTunnel, open_timeout: float) -> None:
    """Close once nobody has been connected for `open_timeout` seconds."""
    while True:
        await trio.sleep_until(tunnel.idle_since + open_timeout)
        if tunnel.in_use:
            tunnel.idle_since = trio.current_time()
        elif trio.current_time() >= tunnel.idle_since + open_timeout:
            tunnel.close(f"nobody was connected for {open_timeout:g} s (open_timeout)")


async def close_after(tunnel: TimedTunnel, ttl: float) -> None:
    """Close `ttl` seconds after it was opened, whatever the tunnel does."""
    await trio.sleep_until(tunnel.opened_at + ttl)
    tunnel.close(f"its {ttl:g} s are over (ttl)")


async def close_when_idle(tunnel: TimedTunnel, idle_timeout: float) -> None:
    """Close once no byte has moved and no visitor has come for `idle_timeout` seconds."""
    seen = tunnel.activity
    while tunnel.idle_checks < LOOKS:
        await trio.sleep(idle_timeout / LOOKS)
        now = tunnel.activity
        tunnel.idle_checks = tunnel.idle_checks + 1 if now == seen else 0
        seen = now
    tunnel.close(f"no byte moved for {idle_timeout:g} s (idle_timeout)")
