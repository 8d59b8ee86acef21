"""What a test needs of the machine and may not find there: the test is skipped with a reason that names it.

Where `TUNNELD_REQUIRE_PROGRAMS` is set, as CI does, the test fails instead: no skip hides what CI is to test.
"""

from __future__ import annotations

import os
import pty
import re
import shutil
import socket
import sys
from pathlib import Path
from typing import NoReturn

import pytest

PLACES = ["/usr/sbin", "/sbin", *map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True))]
"""Where programs live beside PATH."""


def find_program(name: str) -> str:
    """The path of a system program."""
    path = shutil.which(name, path=":".join([os.environ.get("PATH", ""), *PLACES]))
    return path or lacking(f"{name} is not installed")


def lacking(reason: str) -> NoReturn:
    """Skip the test, or fail it where the run requires everything."""
    if os.environ.get("TUNNELD_REQUIRE_PROGRAMS"):
        pytest.fail(f"{reason}, and this run requires it")
    pytest.skip(reason)


def has_ipv6() -> bool:
    """Whether ::1 is an address of this machine; the kernel may know IPv6 and have it switched off."""
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return socket.has_dualstack_ipv6()


def need_ipv6() -> None:
    """For tests of it."""
    if not has_ipv6():
        lacking("this machine has no IPv6")


def open_terminal() -> tuple[int, int]:
    """A pseudo-terminal: its two ends."""
    try:
        return pty.openpty()
    except OSError as error:
        lacking(f"no pseudo-terminal is to be had, see /dev/pts ({error})")


def is_root_with(*capabilities: int) -> bool:
    """Whether we are root and have these capabilities (by their numbers), which a container may have taken away."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return False
    (effective,) = re.findall(r"^CapEff:\s*(\w+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    return all(int(effective, 16) >> each & 1 for each in capabilities)


def only_skip(group: BaseExceptionGroup[BaseException]) -> BaseException | None:
    """The skip in a group that holds nothing else: what a nursery makes of one that was raised in its block."""
    first: BaseException | None = None
    for error in group.exceptions:
        each = only_skip(error) if isinstance(error, BaseExceptionGroup) else error
        if not isinstance(each, pytest.skip.Exception):
            return None
        first = each
    return first
