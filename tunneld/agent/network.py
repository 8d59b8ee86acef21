"""Reasons to retry before a delay is over: the network changed, or the machine was suspended.

    monitor
    ├─ network        on Linux: a netlink socket that reports changes of links, addresses and routes
    └─ clock          everywhere: detects time that passed while the scheduler's clock stood still

On other systems a network change goes unnoticed; the next attempt finds out.
"""

from __future__ import annotations

import errno
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import trio

CLOCK_INTERVAL = 5.0
"""Seconds between two looks at the clock: after a laptop is opened, short enough to reconnect before anything is typed.
"""
MIN_SUSPEND = 2.0
"""Seconds that must be missing to count as a suspend: more than a busy machine or a clock correction causes."""
SETTLE_DELAY = 0.5
"""Seconds from the first sign of a network change to the retry: the address comes before its route, both in bursts."""
NETLINK_READ_SIZE = 65536
"""Bytes of one netlink message. Messages are not parsed: that one arrived says enough."""
_GROUPS = 0x1 | 0x10 | 0x40 | 0x100 | 0x400  # RTMGRP_LINK, _IPV4_IFADDR, _IPV4_ROUTE, _IPV6_IFADDR, _IPV6_ROUTE


def suspended_for() -> float:
    """Seconds that passed while the scheduler's clock stood still; only differences between calls mean anything.

    Linux has one clock that counts suspends and one that does not. Other systems use the wall clock, which also jumps
    when it is set. That causes a needless wake-up, which costs one attempt.
    """
    boottime = getattr(time, "CLOCK_BOOTTIME", None)
    return (time.time() if boottime is None else time.clock_gettime(boottime)) - time.monotonic()


def network_changes() -> socket.socket | None:
    """Return a socket that becomes readable when the network changes, owned by the caller; None if the system has none
    or does not permit it.
    """
    if sys.platform != "linux":
        return None
    try:
        changes = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE)
    except OSError:
        return None
    try:
        changes.bind((0, _GROUPS))
    except OSError:
        changes.close()
        return None
    return changes


class NetworkMonitor:
    """Wakes tasks that wait to retry, and calls callbacks, after a network change or a suspend."""

    def __init__(
        self,
        suspended_for: Callable[[], float] = suspended_for,
        changes: Callable[[], socket.socket | None] = network_changes,
    ) -> None:
        """Tests pass other sources of suspends and network changes."""
        self._suspended_for = suspended_for
        self._open_changes = changes
        self._woken = trio.Event()
        self._callbacks: list[Callable[[], None]] = []

    async def run(self) -> None:
        """Watch until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch_clock)
            if (changes := self._open_changes()) is not None:
                nursery.start_soon(self._watch_network, changes)

    async def sleep(self, seconds: float) -> bool:
        """Sleep, until `wake` at the latest; returns whether `wake` ended it."""
        with trio.move_on_after(seconds):
            await self._woken.wait()
            return True
        return False

    def wake(self) -> None:
        """End all sleeps now and call the callbacks."""
        self._woken.set()
        self._woken = trio.Event()
        for callback in list(self._callbacks):
            callback()

    @contextmanager
    def calling(self, callback: Callable[[], None]) -> Iterator[None]:
        """While the block runs, `wake` also calls `callback`: open connections may be dead."""
        self._callbacks.append(callback)
        try:
            yield
        finally:
            self._callbacks.remove(callback)

    async def _watch_clock(self) -> None:
        before = self._suspended_for()
        while True:
            await trio.sleep(CLOCK_INTERVAL)
            now = self._suspended_for()
            if now - before >= MIN_SUSPEND:
                self.wake()
            before = now

    async def _watch_network(self, changes: socket.socket) -> None:
        with changes:
            while True:
                await trio.lowlevel.wait_readable(changes)
                await trio.sleep(SETTLE_DELAY)
                _discard_messages(changes)
                self.wake()


def is_local_address(address: Any) -> bool:
    """Whether this machine still has a socket's local address. If not, the socket's connection is dead.

    `address` is what `getsockname` returned. Tested by binding a UDP socket to it.
    """
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as test_socket:
        try:
            test_socket.bind((address[0], 0, *address[2:]))
        except OSError as error:
            return error.errno != errno.EADDRNOTAVAIL
    return True


def _discard_messages(changes: socket.socket) -> None:
    """Read everything that has arrived. An overflow of the kernel's buffer (ENOBUFS) is a change as well."""
    while True:
        try:
            changes.recv(NETLINK_READ_SIZE)
        except BlockingIOError:
            return
        except OSError:
            continue
