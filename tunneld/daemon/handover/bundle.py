"""The sockets and buffered bytes of a handover, and the file with the manifest.

Both processes identify a socket by its inode, which is unique while the socket exists: on the way through systemd,
descriptors change their numbers and their order. The manifest is a sealed memfd, so that no process can change its
content.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import stat
from collections.abc import Iterable, Iterator

MAX_HELD = 256 * 1024 * 1024
"""Buffered bytes that are handed over, of all connections together: 64 KiB for each of 4096 slow readers."""
MAX_MANIFEST = MAX_HELD + 512 * 1024 * 1024
"""Largest size in bytes of a manifest: half a million relayed connections need 500 bytes each at most."""

SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


class MissingError(Exception):
    """A socket in the manifest was not received."""


class FdBundle:
    """The sockets and buffered bytes of one handover, in the process that sends them and in the one that receives."""

    def __init__(self, max_sockets: int = 1 << 20) -> None:
        """`max_sockets`: how many sockets can be handed over."""
        self.held = bytearray()
        self._max_sockets = max_sockets
        self._sockets: dict[int, socket.socket] = {}
        self._taken: dict[int, socket.socket] = {}

    @property
    def sockets(self) -> list[socket.socket]:
        """The sockets in the bundle: those put in, without those taken out."""
        return list(self._sockets.values())

    def has_room(self, sockets: int, size: int = 0) -> bool:
        """Whether this many more sockets and buffered bytes fit."""
        return len(self._sockets) + sockets <= self._max_sockets and len(self.held) + size <= MAX_HELD

    def __contains__(self, inode: int) -> bool:
        return inode in self._sockets

    def put(self, packed: socket.socket) -> int:
        """Add a socket, which the bundle owns from now on. Returns its inode."""
        inode = os.fstat(packed.fileno()).st_ino
        self._sockets[inode] = packed
        return inode

    def hold(self, data: bytes) -> tuple[int, int]:
        """Add buffered bytes. Returns their offset and length."""
        start = len(self.held)
        self.held += data
        return start, len(data)

    def take(self, inode: int) -> socket.socket:
        """Remove a socket, which the caller owns from now on. Raises `MissingError`."""
        try:
            taken = self._sockets.pop(inode)
        except KeyError:
            raise MissingError(f"socket {inode} was not received") from None
        self._taken[inode] = taken
        return taken

    def take_all(self, inodes: Iterable[int]) -> list[socket.socket]:
        """Remove these sockets, except those that were not received."""
        return [self.take(inode) for inode in inodes if inode in self]

    @contextlib.contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """Put back what was taken in the block if the block raises."""
        self._taken.clear()
        try:
            yield
        except BaseException:
            self._sockets |= self._taken
            raise

    def take_held(self, place: tuple[int, int]) -> bytes:
        """Return buffered bytes, given their offset and length. Raises `MissingError`."""
        start, count = place
        if not 0 <= start <= start + count <= len(self.held):
            raise MissingError(f"bytes {start}+{count} were not received")
        return bytes(self.held[start : start + count])

    def close(self) -> None:
        """Close the sockets that are still in the bundle."""
        for unwanted in self._sockets.values():
            unwanted.close()
        self._sockets.clear()


def adopt(fds: Iterable[int]) -> tuple[FdBundle, list[int]]:
    """Sort descriptors into a bundle with the sockets and a list of regular files, which may be manifests.

    Takes ownership of all descriptors, and closes those of any other kind.
    """
    bundle, files = FdBundle(), []
    for fd in fds:
        with contextlib.suppress(OSError):
            mode = os.fstat(fd).st_mode
            if stat.S_ISSOCK(mode):
                adopted = socket.socket(fileno=fd)
                adopted.setblocking(False)
                adopted.set_inheritable(False)
                bundle.put(adopted)
            elif stat.S_ISREG(mode):
                files.append(fd)
            else:
                os.close(fd)
    return bundle, files


def write_manifest(text: bytes, held: bytes | bytearray) -> int:
    """Write a manifest and the buffered bytes to a sealed file. Returns its descriptor. Raises OSError."""
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
    """Read a manifest and close its descriptor. Raises OSError, and `ValueError` if it is not one of ours."""
    try:
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & SEALS != SEALS:
            raise ValueError("it is not sealed")
        if (size := os.fstat(fd).st_size) > MAX_MANIFEST:
            raise ValueError(f"its size of {size} bytes is above the limit")
        return os.pread(fd, size, 0)
    finally:
        os.close(fd)
