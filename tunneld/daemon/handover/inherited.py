"""What the environment says of descriptors that were open when the process began. Pure.

    LISTEN_PID, LISTEN_FDS, LISTEN_FDNAMES    sd_listen_fds(3): systemd's sockets, and what it stored for us
    TUNNELD_HANDOVER=PID:FD                   ours: the letter of the process that became this one

Each names the process that it is for; another one, a child that inherited the variable, has nothing to do with it.

Socket activation: listeners that systemd made for our faces, systemd.socket(5).
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from tunneld.errors import ConfigError, reason_of

FIRST = 3
"""SD_LISTEN_FDS_START: behind standard input, output and error."""
STORED = "kept"
"""The name of what we gave systemd to keep (FDNAME); every other name is that of a face."""
MANIFEST = "TUNNELD_HANDOVER"


@dataclass(frozen=True, slots=True)
class Inherited:
    """Descriptors by their numbers."""

    given: Sequence[tuple[int, str]] = ()  # systemd's own sockets, each with its name
    stored: Sequence[int] = ()  # what a process before this one gave systemd to keep
    letter: int | None = None  # of the process that became this one

    @classmethod
    def parse(cls, environ: Mapping[str, str], pid: int) -> Inherited:
        """Read the variables that are for the process `pid`. Raises `ConfigError` where they make no sense."""
        named = _listened(environ, pid)
        given = tuple((fd, name) for fd, name in named if name != STORED)
        return cls(given, tuple(fd for fd, name in named if name == STORED), _letter(environ, pid))


def _listened(environ: Mapping[str, str], pid: int) -> list[tuple[int, str]]:
    if environ.get("LISTEN_PID", "") != str(pid):
        return []
    count = environ.get("LISTEN_FDS", "")
    if not (count.isascii() and count.isdigit() and len(count) < 7):
        raise ConfigError([f"LISTEN_FDS is {count!r}, which is not a number of descriptors"])
    names = environ.get("LISTEN_FDNAMES", "").split(":") if int(count) else []
    if len(names) != int(count):
        raise ConfigError(
            [f"LISTEN_FDNAMES names {len(names)} descriptors, but LISTEN_FDS counts {count}: set FileDescriptorName="]
        )
    return list(zip(range(FIRST, FIRST + int(count)), names, strict=True))


def _letter(environ: Mapping[str, str], pid: int) -> int | None:
    whose, _, number = environ.get("TUNNELD_HANDOVER", "").partition(":")
    mine = whose == str(pid) and number.isascii() and number.isdigit()
    return int(number) if mine else None


def check_given(given: Sequence[tuple[int, str]], faces: Collection[str]) -> dict[str, list[socket.socket]]:
    """The listeners of each face that has any, ours from now on, by the names of their units.

    Raises `ConfigError` with a sentence for each that cannot be one.
    """
    found: dict[str, list[socket.socket]] = {}
    problems = []
    for fd, name in given:
        wrong = _wrong(fd, name, faces)
        if wrong:
            problems.append(f"systemd's socket {fd}, named {name!r}, {wrong}")
            continue
        listener = socket.socket(fileno=fd)
        listener.setblocking(False)
        listener.set_inheritable(False)
        found.setdefault(name, []).append(listener)
    if problems:
        raise ConfigError(problems)
    return found


def _wrong(fd: int, name: str, faces: Collection[str]) -> str:
    if name not in faces:
        return f"is for no face that is enabled: FileDescriptorName= of its unit must be {' or '.join(faces)}"
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            return "is no socket: its unit needs ListenStream="
        with socket.socket(fileno=os.dup(fd)) as copy:
            if copy.family not in {socket.AF_INET, socket.AF_INET6}:
                return "is not of TCP: ListenStream= must be a port, or an address and a port"
            if copy.type != socket.SOCK_STREAM:
                return "is not of TCP: its unit needs ListenStream=, not ListenDatagram="
            if not copy.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                return "is a connection, not a listener: its unit must not say Accept=yes"
    except OSError as error:
        return f"cannot be used: {reason_of(error)}"
    return ""
