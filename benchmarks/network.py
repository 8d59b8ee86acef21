"""A network of our own, where the system allows it: its loopback, its ports, its settings, and nobody else's packets.

It matters most for congestion control, of which a machine has one default. BBR, common on servers, paces a stream by
timers even on loopback, and then a benchmark of bulk measures timers. A setting of a network is private to it, so
nothing on the machine is changed, and all topologies have the same.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
from contextlib import suppress
from pathlib import Path

CLONE_NEWUSER = 0x10000000  # unshare(2)
CLONE_NEWNET = 0x40000000
SIOCSIFFLAGS = 0x8914  # netdevice(7)
IFF_UP = 1
CONTROLS = ("cubic", "reno")  # neither paces; the first is not allowed in a network of one's own everywhere
CONTROL = Path("/proc/sys/net/ipv4/tcp_congestion_control")  # of the network that the reader is in


def own_network() -> bool:
    """Move this process, and the children it will have, to a network of its own; whether that was allowed."""
    uid, gid = os.getuid(), os.getgid()
    flags = CLONE_NEWNET if uid == 0 else CLONE_NEWNET | CLONE_NEWUSER  # only root may without being somebody first
    if ctypes.CDLL(None).unshare(flags):
        return False
    if flags & CLONE_NEWUSER:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh22x", b"lo", IFF_UP))
    for control in CONTROLS:
        with suppress(OSError):
            CONTROL.write_text(control)
            break
    return True


def congestion_control() -> str:
    """The one that sockets of this network get."""
    return CONTROL.read_text().strip()
