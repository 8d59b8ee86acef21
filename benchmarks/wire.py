"""`python -m benchmarks.wire ONE OTHER MILLISECONDS`: connect two network namespaces with a delay.

This replaces netem, which not every kernel has: two TUN devices, and a program that reads a packet from one, keeps it
for half of the round trip and writes it to the other. Packets are not lost, reordered or slowed down on purpose, so TCP
sees a long and otherwise perfect path, with its own windows and slow start from end to end. A relay of streams would
hide these.

The MTU is 1500, but packets cross in groups of up to 64 KiB that the kernel makes for network cards with segmentation
offload (TSO, behind a virtio header, which is passed on unchanged). That makes Python fast enough: without delay it
carries 8 to 10 Gbit/s on one core, thirty times what a stream needs with a window of 4 MiB, the maximum that Linux
sends ahead by default, and a round trip of 100 ms.

The devices are 10.79.0.1 in ONE and 10.79.0.2 in OTHER. The program prints `ready` and runs until it is killed.
"""

from __future__ import annotations

import fcntl
import os
import select
import struct
import sys
import time
from collections import deque

ADDRESSES = "10.79.0.1", "10.79.0.2"
TUNSETIFF, TUNSETOFFLOAD = 0x400454CA, 0x400454D0  # linux/if_tun.h
IFF_TUN, IFF_NO_PI, IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
TUN_F_CSUM, TUN_F_TSO4 = 0x01, 0x02
MAX_PACKET = 65536 + 64
BATCH = 64
"""Packets read from one side before the other one has its turn."""
QUEUE = "10000"
"""Packets that the kernel queues, so that a burst is not lost if this program is late."""


class Side:
    """One device, and the packets on their way to it."""

    def __init__(self, name: str) -> None:
        self.fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(self.fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI | IFF_VNET_HDR))
        fcntl.ioctl(self.fd, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4)
        self.coming: deque[tuple[float, bytes]] = deque()


def carry(one: Side, other: Side, delay: float) -> None:
    """Carry packets in both directions for ever, with a delay of `delay` seconds."""
    directions = ((one, other), (other, one))
    poller = select.epoll()
    for side in (one, other):
        poller.register(side.fd, select.EPOLLIN)
    while True:
        now = time.monotonic()
        for source, target in directions:
            _read(source.fd, target, now + delay)
            _deliver(target, now)
        due = [side.coming[0][0] for side in (one, other) if side.coming]
        wait = max(min(due) - time.monotonic(), 0) if due else None
        select.select([poller], [], [], wait)  # select waits with microsecond resolution, epoll does not


def _read(fd: int, target: Side, due: float) -> None:
    for _ in range(BATCH):
        try:
            target.coming.append((due, os.read(fd, MAX_PACKET)))
        except BlockingIOError:
            return


def _deliver(side: Side, now: float) -> None:
    coming = side.coming
    while coming and coming[0][0] <= now:
        os.write(side.fd, coming.popleft()[1])


def main() -> None:
    """Make the devices, move each to its namespace, and carry packets."""
    machines, milliseconds = sys.argv[1:3], float(sys.argv[3])
    names = [f"w{os.getpid()}{end}" for end in "ab"]
    sides = [Side(name) for name in names]
    for name, machine, address, peer in zip(names, machines, ADDRESSES, reversed(ADDRESSES), strict=True):
        for command in (
            f"ip link set {name} netns {machine} mtu 1500 txqueuelen {QUEUE}",
            f"ip -n {machine} address add {address} peer {peer} dev {name}",
            f"ip -n {machine} link set {name} up",
        ):
            if os.spawnlp(os.P_WAIT, "ip", *command.split()):
                sys.exit(f"could not `{command}`")
    print("ready", flush=True)
    carry(sides[0], sides[1], milliseconds / 2000)


if __name__ == "__main__":
    main()
