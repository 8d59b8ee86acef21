"""Borrowed pipes: the kernel buffers through which bulk flows are spliced.

A flow borrows a pipe when it has bulk to move and gives it back as soon as it is empty again, so that an idle relay
owns none and a busy process works through a few pipes that stay warm. Only a flow whose target is blocked keeps one.
The pool is bounded, and where it or the kernel refuses (EMFILE, fs.pipe-user-pages-soft) the flow stays on the engine's
shared buffer.
"""

from __future__ import annotations

import contextlib
import fcntl
import os

MOVE = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK


class Pipe:
    """One kernel pipe and the number of bytes in it."""

    __slots__ = ("count", "read_fd", "size", "write_fd")

    def __init__(self, size: int) -> None:
        """Open a pipe of about `size` bytes, as large as the kernel allows. Raises OSError where it allows none."""
        self.read_fd, self.write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        with contextlib.suppress(OSError):
            fcntl.fcntl(self.write_fd, fcntl.F_SETPIPE_SZ, size)
        self.size = fcntl.fcntl(self.write_fd, fcntl.F_GETPIPE_SZ)
        self.count = 0

    def fill(self, source_fd: int) -> int:
        """Splice what stands in a socket into this empty pipe; the number of bytes. Raises OSError as `splice` does.

        A count below `size` does not mean that the socket is drained: small segments use up slots before bytes.
        """
        self.count = os.splice(source_fd, self.write_fd, self.size, flags=MOVE)
        return self.count

    def drain(self, target_fd: int) -> int:
        """Splice what this pipe holds into a socket; the number of bytes. Raises OSError as `splice` does."""
        moved = os.splice(self.read_fd, target_fd, self.count, flags=MOVE)
        self.count -= moved
        return moved

    def close(self) -> None:
        """Give both descriptors back to the system."""
        os.close(self.read_fd)
        os.close(self.write_fd)


class Pipes:
    """The pool of one pump."""

    def __init__(self, size: int, most: int, least: int, below: int) -> None:
        """Pipes of `size` bytes, `most` at one time, of descriptors `below` a number; one that comes out below `least`
        is not worth its system calls.
        """
        self._size = size
        self._most = most
        self._least = least
        self._below = below
        self._idle: list[Pipe] = []
        self.open = 0

    def borrow(self) -> Pipe | None:
        """An empty pipe, or None where the pool or the kernel refuses one."""
        if self._idle:
            return self._idle.pop()
        if self.open >= self._most:
            return None
        try:
            pipe = Pipe(self._size)
        except OSError:
            return None
        if pipe.size < self._least or max(pipe.read_fd, pipe.write_fd) >= self._below:
            pipe.close()
            return None
        self.open += 1
        return pipe

    def give_back(self, pipe: Pipe) -> None:
        """Take a pipe back; one that still holds bytes of a dead flow is closed."""
        if pipe.count:
            pipe.close()
            self.open -= 1
        else:
            self._idle.append(pipe)

    def close(self) -> None:
        """Close the idle pipes; flows give back theirs when they end."""
        while self._idle:
            self._idle.pop().close()
            self.open -= 1
