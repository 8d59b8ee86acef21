"""Borrowed pipes: the kernel buffers through which bulk data is spliced.

A flow borrows a pipe when it has bulk data to move and returns it once the pipe is empty. So an idle relay owns no
pipe, a busy process works through a few pipes that stay warm in the cache, and only a flow whose target is blocked
keeps one. The pool is bounded. Where the pool or the kernel refuses a pipe (EMFILE, fs.pipe-user-pages-soft), the flow
uses the pump's shared buffer instead.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from typing import Final

SPLICE_FLAGS: Final = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK


SPLICE_REFUSALS: Final = frozenset(
    {errno.EAGAIN, errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.ENOMEM, errno.ENOBUFS, errno.EMFILE, errno.ENFILE}
)
"""Errors of splice(2) itself; any other one is the socket's."""


class Pipe:
    """One kernel pipe, and the number of bytes in it."""

    __slots__ = ("count", "read_fd", "size", "write_fd")

    def __init__(self, size: int) -> None:
        """Open a pipe of `size` bytes, or of as many as the kernel allows. Raises OSError if it allows no pipe."""
        self.read_fd, self.write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        with contextlib.suppress(OSError):
            fcntl.fcntl(self.write_fd, fcntl.F_SETPIPE_SZ, size)
        self.size = fcntl.fcntl(self.write_fd, fcntl.F_GETPIPE_SZ)
        self.count = 0

    def fill(self, source_fd: int, max_bytes: int) -> int:
        """Splice from a socket into this empty pipe, at most `max_bytes`; return the number of bytes. Raises OSError as
        `splice` does.

        A number below `size` does not mean that the socket is drained: small segments use up the slots of the pipe
        before its bytes.
        """
        self.count = os.splice(source_fd, self.write_fd, min(self.size, max_bytes), flags=SPLICE_FLAGS)
        return self.count

    def drain(self, target_fd: int) -> int:
        """Splice from this pipe into a socket and return the number of bytes. Raises OSError as `splice` does."""
        moved = os.splice(self.read_fd, target_fd, self.count, flags=SPLICE_FLAGS)
        self.count -= moved
        return moved

    def close(self) -> None:
        """Close both descriptors."""
        os.close(self.read_fd)
        os.close(self.write_fd)


class PipePool:
    """The pipes of one pump."""

    def __init__(self, size: int, max_open: int, min_size: int, fd_limit: int) -> None:
        """At most `max_open` pipes of `size` bytes, with descriptors below `fd_limit`.

        A pipe that the kernel makes smaller than `min_size` bytes is not worth its system calls and is not used.
        """
        self._size = size
        self._max_open = max_open
        self._min_size = min_size
        self._fd_limit = fd_limit
        self._idle: list[Pipe] = []
        self.open = 0

    def borrow(self) -> Pipe | None:
        """Return an empty pipe, or None if the pool or the kernel refuses one."""
        if self._idle:
            return self._idle.pop()
        if self.open >= self._max_open:
            return None
        try:
            pipe = Pipe(self._size)
        except OSError:
            return None
        if pipe.size < self._min_size or max(pipe.read_fd, pipe.write_fd) >= self._fd_limit:
            pipe.close()
            return None
        self.open += 1
        return pipe

    def fill(self, source_fd: int, max_bytes: int) -> Pipe | None:
        """Splice from a socket into a borrowed pipe. None: there are no bytes, or the pool or the kernel refuses; a
        plain read tells. Raises OSError if the socket is broken: no read would report that again.
        """
        pipe = self.borrow()
        if pipe is None:
            return None
        try:
            if pipe.fill(source_fd, max_bytes):
                return pipe
        except OSError as error:
            if error.errno not in SPLICE_REFUSALS:
                self.give_back(pipe)
                raise
        self.give_back(pipe)
        return None

    def give_back(self, pipe: Pipe) -> None:
        """Take back a borrowed pipe. One that still holds bytes of an ended flow is closed."""
        if pipe.count:
            pipe.close()
            self.open -= 1
        else:
            self._idle.append(pipe)

    def close(self) -> None:
        """Close the idle pipes. Borrowed ones come back when their flows end."""
        while self._idle:
            self._idle.pop().close()
            self.open -= 1
