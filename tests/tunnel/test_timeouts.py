"""The times after which a tunnel closes by itself, on a virtual clock."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio
from trio.testing import MockClock

from tunneld.tunnel import timeouts


class FakeTunnel:
    """What the timeouts read of a tunnel; they close it."""

    def __init__(self) -> None:
        self.opened_at = self.idle_since = trio.current_time()
        self.idle_checks = 0
        self.in_use = False
        self.activity: object = 0
        self.closed_at = 0.0
        self.scope = trio.CancelScope()

    def expire(self, reason: str) -> None:
        self.close(reason)

    def close(self, reason: str) -> None:
        self.closed_at = trio.current_time()
        self.scope.cancel()

    async def closes_after(self, timeout: Callable[[], Awaitable[None]]) -> float:
        started = trio.current_time()
        with trio.fail_after(10_000), self.scope:
            await timeout()
        return self.closed_at - started


async def test_an_unused_tunnel_closes_after_open_timeout(autojump_clock: MockClock) -> None:
    tunnel = FakeTunnel()
    assert await tunnel.closes_after(lambda: timeouts.close_when_unused(tunnel, 300)) == 300


async def test_open_timeout_counts_from_the_end_of_the_last_connection(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    tunnel = FakeTunnel()
    tunnel.in_use = True

    async def disconnect() -> None:
        await trio.sleep(1000)
        tunnel.in_use, tunnel.idle_since = False, trio.current_time()

    nursery.start_soon(disconnect)
    assert await tunnel.closes_after(lambda: timeouts.close_when_unused(tunnel, 300)) == 1300


async def test_ttl_closes_a_tunnel_in_use(autojump_clock: MockClock) -> None:
    tunnel = FakeTunnel()
    tunnel.in_use = True
    assert await tunnel.closes_after(lambda: timeouts.close_after(tunnel, 60)) == 60


async def test_an_idle_tunnel_closes_at_most_an_eighth_late(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    tunnel = FakeTunnel()

    async def move_a_byte() -> None:
        await trio.sleep(75)
        tunnel.activity = 1

    nursery.start_soon(move_a_byte)
    closed_after = await tunnel.closes_after(lambda: timeouts.close_when_idle(tunnel, 80))
    assert 75 + 80 <= closed_after <= 75 + 80 + 80 / timeouts.IDLE_CHECKS
