"""Requirements of tests that a machine may lack. Then the test is skipped, with a reason.

If `TUNNELD_REQUIRE_PROGRAMS` is set, as in CI, the test fails instead, unless the program is one of `TUNNELD_MAY_LACK`,
which are separated by spaces.
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
"""Folders of programs in addition to PATH."""


def find_program(name: str) -> str:
    """Return the path of a system program. Skips the test if it is not installed."""
    path = shutil.which(name, path=":".join([os.environ.get("PATH", ""), *PLACES]))
    if path is None and name in os.environ.get("TUNNELD_MAY_LACK", "").split():
        pytest.skip(f"{name} is not installed")
    return path or lacking(f"{name} is not installed")


def lacking(reason: str) -> NoReturn:
    """Skip the test, or the module that is being imported; fail it if the run requires all programs."""
    if os.environ.get("TUNNELD_REQUIRE_PROGRAMS"):
        pytest.fail(f"{reason}, and this run requires it")
    pytest.skip(reason, allow_module_level=True)


def has_ipv6() -> bool:
    """Whether ::1 is an address of this machine; IPv6 may be disabled in the kernel."""
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return socket.has_dualstack_ipv6()


def need_ipv6() -> None:
    """Skip the test if this machine has no IPv6."""
    if not has_ipv6():
        lacking("this machine has no IPv6")


def open_terminal() -> tuple[int, int]:
    """Open a pseudo-terminal; returns both ends. Skips the test if there is none."""
    try:
        return pty.openpty()
    except OSError as error:
        lacking(f"no pseudo-terminal is available, see /dev/pts ({error})")


def is_root_with(*capabilities: int) -> bool:
    """Whether we are root and have these capabilities (by their numbers), which a container may have taken away."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return False
    (effective,) = re.findall(r"^CapEff:\s*(\w+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    return all(int(effective, 16) >> each & 1 for each in capabilities)


def only_skip(group: BaseExceptionGroup[BaseException]) -> BaseException | None:
    """Return the skip in a group with nothing else, which a nursery makes of a skip in its block; otherwise None."""
    first: BaseException | None = None
    for error in group.exceptions:
        each = only_skip(error) if isinstance(error, BaseExceptionGroup) else error
        if not isinstance(each, pytest.skip.Exception):
            return None
        first = each
    return first
