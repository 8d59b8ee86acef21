"""Reasons to try again before a wait is over: the network changed, or the machine was asleep.

    wake
    ├─ network        on Linux: a netlink socket that says when a link, an address or a route changes
    └─ clock          everywhere: looks whether time went by that the scheduler did not see

Elsewhere than on Linux nobody says that the network changed; the next try finds out.
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

TICK = 5.0
"""Seconds between two looks at the clock: a laptop that was opened is looked at before a person has typed anything."""
JUMP = 2.0
"""Seconds that must be missing: more than a busy machine or a corrected clock puts between two readings."""
SETTLE = 0.5
"""Seconds from the first sign of a changed network to the try: an address comes before its route, both in bursts."""
LARGEST = 65536
"""Octets of one message, which is not read: that there is one says enough."""
_GROUPS = 0x1 | 0x10 | 0x40 | 0x100 | 0x400  # RTMGRP_LINK, _IPV4_IFADDR, _IPV4_ROUTE, _IPV6_IFADDR, _IPV6_ROUTE


def suspended_for() -> float:
    """Seconds that went by while the scheduler's clock stood; only differences mean anything.

    Linux has a clock that counts sleep and one that does not. Elsewhere the wall clock must do, which also jumps when
    somebody sets it: that wakes for nothing, and costs one try.
    """
    boottime = getattr(time, "CLOCK_BOOTTIME", None)
    return (time.time() if boottime is None else time.clock_gettime(boottime)) - time.monotonic()


def network_changes() -> socket.socket | None:
    """A socket that becomes readable when the network changes; None where there is none, or it is not for us."""
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
    """What wakes all who wait."""

    def __init__(
        self,
        suspended_for: Callable[[], float] = suspended_for,
        changes: Callable[[], socket.socket | None] = network_changes,
    ) -> None:
        self._unseen = suspended_for
        self._changes = changes
        self._woken = trio.Event()
        self._listeners: list[Callable[[], None]] = []

    async def run(self) -> None:
        """Look out until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch_clock)
            if (changes := self._changes()) is not None:
                nursery.start_soon(self._watch_network, changes)

    async def sleep(self, seconds: float) -> bool:
        """Wait so long, or until there is a reason not to; tells whether there was one."""
        with trio.move_on_after(seconds):
            await self._woken.wait()
            return True
        return False

    def wake(self) -> None:
        """There is a reason: whoever waits, wait no longer."""
        self._woken.set()
        self._woken = trio.Event()
        for listener in list(self._listeners):
            listener()

    @contextmanager
    def telling(self, listener: Callable[[], None]) -> Iterator[None]:
        """While the block runs, `listener` is told, too: what stands may have been cut off."""
        self._listeners.append(listener)
        try:
            yield
        finally:
            self._listeners.remove(listener)

    async def _watch_clock(self) -> None:
        before = self._unseen()
        while True:
            await trio.sleep(TICK)
            now = self._unseen()
            if now - before >= JUMP:
                self.wake()
            before = now

    async def _watch_network(self, changes: socket.socket) -> None:
        with changes:
            while True:
                await trio.lowlevel.wait_readable(changes)
                await trio.sleep(SETTLE)
                drain(changes)
                self.wake()


def is_ours(address: Any) -> bool:
    """Whether a socket's own address is still one of this machine's: without it, its connection is cut off."""
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address[0], 0, *address[2:]))
        except OSError as error:
            return error.errno != errno.EADDRNOTAVAIL
    return True


def drain(changes: socket.socket) -> None:
    """Read everything that is there. More than the kernel could hold (ENOBUFS) is a change as well."""
    while True:
        try:
            changes.recv(LARGEST)
        except BlockingIOError:
            return
        except OSError:
            continue
