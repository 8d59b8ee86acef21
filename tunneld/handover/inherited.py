"""What the environment says of descriptors that were open when the process began. Pure.

    LISTEN_PID, LISTEN_FDS, LISTEN_FDNAMES    sd_listen_fds(3): systemd's sockets, and what it stored for us
    TUNNELD_HANDOVER=PID:FD                   ours: the letter of the process that became this one

Each names the process that it is for; another one, a child that inherited the variable, has nothing to do with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tunneld.errors import ConfigError

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
