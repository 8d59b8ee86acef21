"""Which asyncssh is installed, and so which path packets take.

The fast path overrides private methods of asyncssh, and the refusals in restricted.py do too. A new release, for
example one with a security fix, may have changed them. Then portable.py is used, which is slow and needs the public
interface only.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import asyncssh
import structlog

if TYPE_CHECKING:
    from tunneld.backends.ssh.carrier import SshCarrier
    from tunneld.backends.ssh.fast import FastConnection
    from tunneld.backends.ssh.portable import PortableCarrier, PortableConnection

    ClientConnection: TypeAlias = FastConnection | PortableConnection
    ForwardCarrier: TypeAlias = SshCarrier | PortableCarrier

log = structlog.get_logger("ssh")

KNOWN_VERSIONS = ((2, 24),)
"""Releases of asyncssh whose internals the fast path was tested with."""
FORCED = "TUNNELD_SSH_PORTABLE"
"""An environment variable: 1 makes this process use the portable path with every version, for tests."""


def is_known(version: str) -> bool:
    """Whether the fast path may be used with this version of asyncssh."""
    words = version.split(".")[:2]
    return all(word.isdecimal() for word in words) and tuple(map(int, words)) in KNOWN_VERSIONS


def use_fast_path() -> bool:
    """Whether this process uses the fast path."""
    return is_known(asyncssh.__version__) and os.environ.get(FORCED) != "1"


@dataclass(frozen=True, slots=True)
class SshPath:
    """The classes of one path. They have the same interface."""

    is_fast: bool
    new_connection: Callable[..., ClientConnection]
    new_carrier: Callable[..., ForwardCarrier]


def choose_path() -> SshPath:
    """The path of this process, with a line in the log if it is the slow one. Only its modules are imported."""
    if use_fast_path():
        from tunneld.backends.ssh import carrier, fast, gcm  # noqa: PLC0415

        gcm.register()
        return SshPath(True, fast.FastConnection, carrier.SshCarrier)
    from tunneld.backends.ssh import portable  # noqa: PLC0415

    known = ", ".join(".".join(map(str, each)) for each in KNOWN_VERSIONS)
    reason = f"asyncssh {asyncssh.__version__} is not one of the versions that the fast path was tested with ({known})"
    log.warning("ssh takes the slow path", reason=reason)
    return SshPath(False, portable.PortableConnection, portable.PortableCarrier)
