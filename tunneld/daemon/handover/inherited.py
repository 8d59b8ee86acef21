"""Descriptors that were open when the process started, as its environment describes them.

    LISTEN_PID, LISTEN_FDS, LISTEN_FDNAMES    sd_listen_fds(3): sockets of systemd, and descriptors it stored for us
    TUNNELD_HANDOVER=PID:FD                   ours: the manifest of the program that this one replaced by execve

Both variables name the process that they are for. Any other process, such as a child that inherited them, ignores them.

Listeners that systemd opened for our services (socket activation, systemd.socket(5)) are checked and adopted here, too.
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from tunneld.errors import ConfigError, reason_of

FIRST_FD = 3
"""SD_LISTEN_FDS_START: the descriptor after standard input, output and error."""
STORED_NAME = "kept"
"""The name (FDNAME) of descriptors that systemd stores for us. Every other name is that of a service."""
MANIFEST_VARIABLE = "TUNNELD_HANDOVER"


@dataclass(frozen=True, slots=True)
class Inherited:
    """Numbers of inherited descriptors."""

    activated: Sequence[tuple[int, str]] = ()  # sockets that systemd opened, each with its name
    stored: Sequence[int] = ()  # descriptors that systemd stored for a previous process
    manifest: int | None = None  # left by the program that this one replaced by execve

    @classmethod
    def parse(cls, environ: Mapping[str, str], pid: int) -> Inherited:
        """Read the variables that are for the process `pid`. Raises `ConfigError` if they are invalid."""
        named = _listen_fds(environ, pid)
        activated = tuple((fd, name) for fd, name in named if name != STORED_NAME)
        return cls(activated, tuple(fd for fd, name in named if name == STORED_NAME), _manifest(environ, pid))


def _listen_fds(environ: Mapping[str, str], pid: int) -> list[tuple[int, str]]:
    if environ.get("LISTEN_PID", "") != str(pid):
        return []
    count = environ.get("LISTEN_FDS", "")
    if not (count.isascii() and count.isdigit() and len(count) < 7):
        raise ConfigError([f"LISTEN_FDS is {count!r}, not a number of descriptors"])
    names = environ.get("LISTEN_FDNAMES", "").split(":") if int(count) else []
    if len(names) != int(count):
        raise ConfigError(
            [f"LISTEN_FDNAMES names {len(names)} descriptors, but LISTEN_FDS counts {count}: set FileDescriptorName="]
        )
    return list(zip(range(FIRST_FD, FIRST_FD + int(count)), names, strict=True))


def _manifest(environ: Mapping[str, str], pid: int) -> int | None:
    owner, _, number = environ.get("TUNNELD_HANDOVER", "").partition(":")
    is_ours = owner == str(pid) and number.isascii() and number.isdigit()
    return int(number) if is_ours else None


def adopt_listeners(activated: Sequence[tuple[int, str]], services: Collection[str]) -> dict[str, list[socket.socket]]:
    """Take ownership of the sockets that systemd opened, and return them by the service that each is named after.

    `services` are the enabled ones. Raises `ConfigError` with a problem for each socket that cannot be used.
    """
    found: dict[str, list[socket.socket]] = {}
    problems = []
    for fd, name in activated:
        problem = _problem_with(fd, name, services)
        if problem:
            problems.append(f"systemd's socket {fd}, named {name!r}, {problem}")
            continue
        listener = socket.socket(fileno=fd)
        listener.setblocking(False)
        listener.set_inheritable(False)
        found.setdefault(name, []).append(listener)
    if problems:
        raise ConfigError(problems)
    return found


def _problem_with(fd: int, name: str, services: Collection[str]) -> str:
    if name not in services:
        return f"matches no enabled service: FileDescriptorName= of its unit must be {' or '.join(services)}"
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            return "is not a socket: its unit needs ListenStream="
        with socket.socket(fileno=os.dup(fd)) as copy:
            if copy.family not in {socket.AF_INET, socket.AF_INET6}:
                return "is not a TCP socket: ListenStream= must be a port, or an address and a port"
            if copy.type != socket.SOCK_STREAM:
                return "is not a TCP socket: its unit needs ListenStream=, not ListenDatagram="
            if not copy.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                return "is a connection, not a listener: its unit must not say Accept=yes"
    except OSError as error:
        return f"cannot be used: {reason_of(error)}"
    return ""
