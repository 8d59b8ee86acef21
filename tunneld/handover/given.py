"""Socket activation: listeners that systemd made for our faces, systemd.socket(5)."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Collection, Sequence

from tunneld.errors import ConfigError, reason_of


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
