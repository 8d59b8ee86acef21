"""sd_notify(3): tell systemd that the daemon is ready, reloads, stops. Nothing happens where no systemd listens.

One datagram of `KEY=value` lines to the socket in `$NOTIFY_SOCKET`, which is a path or, with `@`, an abstract name. The
unit is `Type=notify`, not `notify-reload`: the latter came with systemd 253, and an older one would ignore the whole
line. The messages of a reload are the same for both.
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

PATIENCE = 1.0  # seconds; the manager reads at once or is in trouble that a daemon must not share
BARRIER = 5.0  # seconds; sd_notify(3) waits as long for the same


def ready(status: str = "") -> bool:
    """The daemon takes requests: after the start, and again after a reload."""
    return send(READY="1", STATUS=status)


@contextmanager
def reloading() -> Iterator[None]:
    """A reload lasts as long as the block, however it ends: a refused file leaves the daemon as ready as it was."""
    send(RELOADING="1", MONOTONIC_USEC=str(time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000))
    try:
        yield
    finally:
        ready()


def stopping(status: str = "") -> bool:
    """The daemon drains or stops, and meant to."""
    return send(STOPPING="1", STATUS=status)


def status(text: str) -> bool:
    """One line for `systemctl status`."""
    return send(STATUS=text)


def watchdog_interval() -> float | None:
    """Seconds after which systemd restarts a daemon that did not say `alive` (WatchdogSec); None: it does not mind."""
    usec, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", str(os.getpid()))
    if not (usec.isascii() and usec.isdigit() and int(usec)) or pid != str(os.getpid()):
        return None
    return int(usec) / 1_000_000


def alive(status: str = "") -> bool:
    """The daemon is not stuck; and the line for `systemctl status`, where there is one."""
    return send(WATCHDOG="1", STATUS=status)


def is_heard() -> bool:
    """Whether there is a manager to tell."""
    return bool(os.environ.get("NOTIFY_SOCKET"))


def barrier() -> bool:
    """Wait until the manager has read everything that was sent (sd_notify_barrier(3)); False where it does not, within
    `BARRIER` seconds, or where there is no descriptor left to ask with.
    """
    try:
        ours, theirs = os.pipe2(os.O_CLOEXEC)
    except OSError:
        return False
    try:
        sent = send([theirs], BARRIER="1")
        os.close(theirs)
        if not sent:
            return False
        poll = select.poll()
        poll.register(ours, 0)  # the manager closes its copy, and nobody writes
        return bool(poll.poll(BARRIER * 1000))
    finally:
        os.close(ours)


def send(fds: Sequence[int] = (), **fields: str) -> bool:
    """Send the fields that are not empty, and descriptors. Returns whether somebody took them; a daemon runs as well
    without.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    message = "\n".join(f"{key}={_one_line(value)}" for key, value in fields.items() if value)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as manager:
            manager.settimeout(PATIENCE)
            name = os.fsencode(address)
            manager.connect(b"\0" + name[1:] if address.startswith("@") else name)
            socket.send_fds(manager, [message.encode("utf-8", "replace")], fds)
    except OSError:
        return False
    return True


def _one_line(value: str) -> str:
    """A newline inside a value would start another field."""
    return "".join(character if character.isprintable() else " " for character in value)
