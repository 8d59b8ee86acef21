"""What goes along: sockets, known to both sides by their inodes, and the file with the letter.

A descriptor's number changes on the way through systemd, and the order does, too; the inode of a socket is its own for
as long as it lives. The letter is a memfd whose content is sealed: whoever holds it can read it and nobody change it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import stat
from collections.abc import Iterable, Iterator

MAX_HELD = 256 * 1024 * 1024
"""Octets on their way that go along, of all relays together: four thousand slow readers with a full buffer each."""
MAX_MANIFEST = MAX_HELD + 512 * 1024 * 1024
"""Octets: half a million relays at most, of about 500 octets each."""

SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


class MissingError(Exception):
    """A socket that the letter names has not come along."""


class FdBundle:
    """The sockets and the octets of one handover, on either side of it."""

    def __init__(self, most: int = 1 << 20) -> None:
        """At most so many sockets are taken."""
        self.held = bytearray()
        self._most = most
        self._sockets: dict[int, socket.socket] = {}
        self._taken: dict[int, socket.socket] = {}

    @property
    def sockets(self) -> list[socket.socket]:
        """Those that nobody has taken."""
        return list(self._sockets.values())

    def has_room(self, sockets: int, octets: int = 0) -> bool:
        """Whether so much more fits."""
        return len(self._sockets) + sockets <= self._most and len(self.held) + octets <= MAX_HELD

    def __contains__(self, inode: int) -> bool:
        return inode in self._sockets

    def put(self, packed: socket.socket) -> int:
        """Take a socket along; the inode by which the other side knows it."""
        inode = os.fstat(packed.fileno()).st_ino
        self._sockets[inode] = packed
        return inode

    def hold(self, octets: bytes) -> tuple[int, int]:
        """Take octets along: where they are, and how many."""
        start = len(self.held)
        self.held += octets
        return start, len(octets)

    def take(self, inode: int) -> socket.socket:
        """A socket that has come along, the caller's from now on. Raises `MissingError`."""
        try:
            taken = self._sockets.pop(inode)
        except KeyError:
            raise MissingError(f"socket {inode} has not come along") from None
        self._taken[inode] = taken
        return taken

    def take_all(self, inodes: Iterable[int]) -> list[socket.socket]:
        """Those of these sockets that have come along."""
        return [self.take(inode) for inode in inodes if inode in self]

    @contextlib.contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """What is taken in this block comes back where the block fails."""
        self._taken.clear()
        try:
            yield
        except BaseException:
            self._sockets |= self._taken
            raise

    def take_held(self, place: tuple[int, int]) -> bytes:
        """Octets that have come along. Raises `MissingError`."""
        start, count = place
        if not 0 <= start <= start + count <= len(self.held):
            raise MissingError(f"octets {start}+{count} have not come along")
        return bytes(self.held[start : start + count])

    def close(self) -> None:
        """Close what nobody took."""
        for unwanted in self._sockets.values():
            unwanted.close()
        self._sockets.clear()


def adopt(fds: Iterable[int]) -> tuple[FdBundle, list[int]]:
    """Sockets among descriptors, ours from now on, and the letters among them; whatever is neither is closed."""
    baggage, letters = FdBundle(), []
    for fd in fds:
        with contextlib.suppress(OSError):
            mode = os.fstat(fd).st_mode
            if stat.S_ISSOCK(mode):
                adopted = socket.socket(fileno=fd)
                adopted.setblocking(False)
                adopted.set_inheritable(False)
                baggage.put(adopted)
            elif stat.S_ISREG(mode):
                letters.append(fd)
            else:
                os.close(fd)
    return baggage, letters


def write_manifest(text: bytes, held: bytes | bytearray) -> int:
    """A sealed file with a letter; its descriptor. Raises OSError."""
    fd = os.memfd_create("tunneld-handover", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(text)
            file.write(held)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def read_manifest(fd: int) -> bytes:
    """The content of a letter, whose descriptor is closed. Raises OSError; `ValueError` where it is none of ours."""
    try:
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & SEALS != SEALS:
            raise ValueError("it is not sealed")
        if (size := os.fstat(fd).st_size) > MAX_MANIFEST:
            raise ValueError(f"it has {size} octets")
        return os.pread(fd, size, 0)
    finally:
        os.close(fd)
