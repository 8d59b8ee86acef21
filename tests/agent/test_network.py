"""The network monitor: network changes and suspends end sleeps."""

from __future__ import annotations

import socket

import pytest
import trio
from trio.testing import MockClock

from tunneld.agent import network


async def test_a_suspend_ends_a_sleep(autojump_clock: MockClock) -> None:
    jumps = iter([0.0, 0.0, network.MIN_SUSPEND, network.MIN_SUSPEND])
    monitor = network.NetworkMonitor(lambda: next(jumps, network.MIN_SUSPEND), lambda: None)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(monitor.run)
        assert await monitor.sleep(1000) is True
        assert trio.current_time() == pytest.approx(2 * network.CLOCK_INTERVAL, abs=0.1)
        assert await monitor.sleep(1000) is False
        nursery.cancel_scope.cancel()


async def test_a_network_change_ends_a_sleep(autojump_clock: MockClock) -> None:
    far, near = socket.socketpair()
    near.setblocking(False)
    monitor = network.NetworkMonitor(lambda: 0.0, lambda: near)
    with far:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(monitor.run)
            far.send(b"change")
            assert await monitor.sleep(1000) is True
            nursery.cancel_scope.cancel()


def test_local_addresses_are_told_from_foreign_ones() -> None:
    assert network.is_local_address(("127.0.0.1", 1))
    assert not network.is_local_address(("192.0.2.1", 1)), "reserved for documentation (RFC 5737)"
    assert not network.is_local_address(("2001:db8::1", 1, 0, 0))
