"""sd_notify(3): tell systemd that the daemon is ready, reloads, stops. Nothing happens where no systemd listens.

One datagram of `KEY=value` lines to the socket in `$NOTIFY_SOCKET`, which is a path or, with `@`, an abstract name. The
unit is `Type=notify`, not `notify-reload`: the latter came with systemd 253, and an older one would ignore the whole
line. The messages of a reload are the same for both.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

PATIENCE = 1.0  # seconds; the manager reads at once or is in trouble that a daemon must not share


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


def alive() -> bool:
    """The daemon is not stuck."""
    return send(WATCHDOG="1")


def send(**fields: str) -> bool:
    """Send the fields that are not empty. Returns whether somebody took them; a daemon runs as well without."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    message = "\n".join(f"{key}={_one_line(value)}" for key, value in fields.items() if value)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as manager:
            manager.settimeout(PATIENCE)
            name = os.fsencode(address)
            manager.connect(b"\0" + name[1:] if address.startswith("@") else name)
            manager.sendall(message.encode("utf-8", "replace"))
    except OSError:
        return False
    return True


def _one_line(value: str) -> str:
    """A newline inside a value would start another field."""
    return "".join(character if character.isprintable() else " " for character in value)
