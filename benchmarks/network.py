"""A network namespace for the run, if the system permits it: its own loopback, ports and settings, no other packets.

It matters most for congestion control, since a machine has one default. BBR, common on servers, paces a stream with
timers even on loopback, and then a bulk benchmark measures timers. Settings of a namespace are private to it, so
nothing is changed on the machine, and all topologies have the same.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile

CLONE_NEWNS = 0x00020000  # unshare(2)
CLONE_NEWUSER = 0x10000000
CLONE_NEWNET = 0x40000000
SIOCSIFFLAGS = 0x8914  # netdevice(7)
IFF_UP = 1
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x40000  # mount(2)
CONTROLS = ("cubic", "reno")  # neither paces; the first is not permitted in a namespace everywhere
CONTROL = Path("/proc/sys/net/ipv4/tcp_congestion_control")  # of the namespace of the reader


def own_network() -> bool:
    """Move this process and its future children to a new network namespace. Returns whether that was permitted."""
    uid, gid = os.getuid(), os.getgid()
    flags = CLONE_NEWNET if uid == 0 else CLONE_NEWNET | CLONE_NEWUSER  # only root may do without a user namespace
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


def own_hosts(text: str) -> None:
    """Let this process and its future children find these lines in /etc/hosts, and no other process. Call `own_network`
    before. Does nothing where that is not permitted.
    """
    libc = ctypes.CDLL(None)
    if libc.unshare(CLONE_NEWNS) or libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None):
        return
    with NamedTemporaryFile("w") as file:  # the mount keeps it
        file.write(text)
        file.flush()
        libc.mount(file.name.encode(), b"/etc/hosts", None, MS_BIND, None)


def congestion_control() -> str:
    """Return the default congestion control of this namespace."""
    return CONTROL.read_text().strip()
