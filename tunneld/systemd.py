"""sd_notify(3): notify systemd that the daemon or an agent is ready, reloading or stopping. Without systemd, these do
nothing.

Each message is a datagram of `KEY=value` lines to the socket in `$NOTIFY_SOCKET`, which is a path or, with `@`, an
abstract name. The unit has `Type=notify`, since `notify-reload` came with systemd 253 and an older one would ignore the
whole line. The messages of a reload are the same for both types.
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

SEND_TIMEOUT = 1.0
"""Seconds to send a message; systemd reads at once, unless it hangs, which must not stop the daemon."""
BARRIER_TIMEOUT = 5.0
"""Seconds to wait in `barrier`, as sd_notify_barrier(3) does by default."""


def ready(status: str = "") -> bool:
    """Report that the daemon serves requests, after the start and after each reload."""
    return send(READY="1", STATUS=status)


@contextmanager
def reloading() -> Iterator[None]:
    """Report a reload for the duration of the block, and then that the daemon is ready, even if the reload failed."""
    send(RELOADING="1", MONOTONIC_USEC=str(time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000))
    try:
        yield
    finally:
        ready()


def stopping(status: str = "") -> bool:
    """Report that the daemon is stopping, as requested."""
    return send(STOPPING="1", STATUS=status)


def status(text: str) -> bool:
    """Set the line in `systemctl status`."""
    return send(STATUS=text)


def watchdog_interval() -> float | None:
    """Seconds without `alive` after which systemd restarts the daemon (WatchdogSec=); None if it has no watchdog."""
    usec, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", str(os.getpid()))
    if not (usec.isascii() and usec.isdigit() and int(usec)) or pid != str(os.getpid()):
        return None
    return int(usec) / 1_000_000


def alive(status: str = "") -> bool:
    """Report that the daemon does not hang, and set the status line unless it is empty."""
    return send(WATCHDOG="1", STATUS=status)


def is_available() -> bool:
    """Whether systemd waits for notifications."""
    return bool(os.environ.get("NOTIFY_SOCKET"))


def barrier() -> bool:
    """Wait until systemd has read all messages sent so far (sd_notify_barrier(3)).

    Returns False if it has not within `BARRIER_TIMEOUT` seconds, or if there is no file descriptor left for the pipe.
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
        poll.register(ours, 0)  # POLLHUP when systemd closes its copy
        return bool(poll.poll(BARRIER_TIMEOUT * 1000))
    finally:
        os.close(ours)


def send(fds: Sequence[int] = (), **fields: str) -> bool:
    """Send the fields that are not empty, with descriptors. Returns whether systemd received them; never raises."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    message = "\n".join(f"{key}={_one_line(value)}" for key, value in fields.items() if value)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as manager:
            manager.settimeout(SEND_TIMEOUT)
            name = os.fsencode(address)
            manager.connect(b"\0" + name[1:] if address.startswith("@") else name)
            socket.send_fds(manager, [message.encode("utf-8", "replace")], fds)
    except OSError:
        return False
    return True


def _one_line(value: str) -> str:
    """Replace control characters: a newline inside a value would start another field."""
    return "".join(character if character.isprintable() else " " for character in value)
