"""The portable relay: two tasks that copy between any two Trio streams.

    StreamCopier.run
    ├─ visitor -> server       receive_some, send_all, ...; at the end send_eof
    └─ server -> visitor       the same

Backpressure is `send_all`: nothing is read while a chunk is being sent, so a direction holds one chunk. The price is
that a reset of the source is not noticed meanwhile. Cancelling `run` closes both streams at once, as does every end
other than FINISHED.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import trio
from trio.abc import HalfCloseableStream

from tunneld.engine.engine import Cause, RelayEnd, Side
from tunneld.engine.failures import reset_on_close
from tunneld.engine.throttle import TaskThrottle

COPY_BYTES = 64 * 1024
"Bytes read at a time, and so the most that a stopped direction holds."

STREAM_ERRORS = (trio.BrokenResourceError, trio.ClosedResourceError)


class SideBrokenError(Exception):
    """One side of a copy is broken; the cause of the exception says how."""

    def __init__(self, side: Side) -> None:
        super().__init__(f"{side.value} side broke")
        self.side = side


async def copy(
    source: HalfCloseableStream,
    target: HalfCloseableStream,
    sides: tuple[Side, Side],
    on_moved: Callable[[int], None],
    throttle: TaskThrottle | None = None,
    has_lost_eof: Callable[[], bool] = lambda: False,
) -> None:
    """Copy until the end of file of `source` and pass that on; as fast and as much as `throttle` allows.

    `on_moved` is called with the size of every delivered chunk in bytes, and with 0 at the end of file.

    `has_lost_eof` is asked at an end of file, see `PumpRelay.has_lost_eof`.

    Raises SideBrokenError with the one of `sides` (of source and target) that broke.
    """
    while True:
        try:
            chunk = await source.receive_some(COPY_BYTES)
        except STREAM_ERRORS as error:
            raise SideBrokenError(sides[0]) from error
        try:
            if not chunk:
                for _ in range(2):  # Trio has a checkpoint between a failing send and its exception
                    await trio.lowlevel.checkpoint()
                if has_lost_eof():
                    raise SideBrokenError(sides[0])
                on_moved(0)
                await target.send_eof()
                return
            while chunk:
                count = len(chunk) if throttle is None else await throttle.acquire(len(chunk))
                await target.send_all(chunk[:count])
                on_moved(count)
                chunk = chunk[count:]
        except STREAM_ERRORS as error:
            raise SideBrokenError(sides[1]) from error


class StreamCopier:
    """Two streams joined by two tasks. It owns both. See `Relay` for `up` and `down`."""

    def __init__(
        self,
        visitor: HalfCloseableStream,
        server: HalfCloseableStream,
        *,
        linger: float,
        throttle: TaskThrottle | None = None,
    ) -> None:
        """`linger` is in seconds, see `Engine.join`."""
        self.up = 0
        self.down = 0
        self._visitor = visitor
        self._server = server
        self._linger = linger
        self._throttle = throttle
        self._lingering = False
        self._scope = trio.CancelScope()
        self._end = RelayEnd(Cause.FINISHED)
        self._bug: Exception | None = None
        self._failure: RelayEnd | None = None  # one side takes no more bytes; those that it has sent are delivered
        self.told_end: set[Side] = set()  # sides to which the other's end of file was passed on

    async def run(self) -> RelayEnd:
        """Relay until both directions have ended, close both streams, and return how the relay ended.

        Raises what a stream raises besides BrokenResourceError and ClosedResourceError: a bug in it.
        """
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(
                        self._flow, self._visitor, self._server, (Side.VISITOR, Side.SERVER), self._count_up
                    )
                    nursery.start_soon(
                        self._flow, self._server, self._visitor, (Side.SERVER, Side.VISITOR), self._count_down
                    )
            if self._bug is not None:
                raise self._bug
            if self._scope.cancelled_caught and self._end.cause is Cause.FINISHED:
                self._end = RelayEnd(Cause.LINGERED)
            if self._end.cause is Cause.FINISHED:
                with trio.move_on_after(self._linger), contextlib.suppress(*STREAM_ERRORS):
                    await self._visitor.aclose()
                    await self._server.aclose()
            return self._end
        finally:
            await self._close_now()

    async def _flow(
        self,
        source: HalfCloseableStream,
        target: HalfCloseableStream,
        sides: tuple[Side, Side],
        count: Callable[[int], None],
    ) -> None:
        """Copy one direction. An end of file leaves the other direction running; a failure stops it."""
        try:
            await copy(source, target, sides, count, self._throttle, lambda: self._has_lost_eof(sides[0]))
        except SideBrokenError as broke:
            end = RelayEnd(Cause.RESET, broke.side, os_error(broke))
            if broke.side is sides[1] and sides[0] not in self.told_end and self._failure is None:
                self._failure = end  # the bytes that this side has sent are delivered first
                self._extend_deadline(0)
            else:
                self._finish(self._failure or end)
        except Exception as error:
            self._bug = self._bug or error
            self._scope.cancel()
        else:
            self.told_end.add(sides[1])
            if self._failure is not None:
                self._finish(self._failure)

    def _has_lost_eof(self, side: Side) -> bool:
        """See `PumpRelay.has_lost_eof`."""
        return self._failure is not None and self._failure.consumed_reset_of(side)

    def _finish(self, end: RelayEnd) -> None:
        """Stop both directions. The first reason counts."""
        if self._end.cause is Cause.FINISHED:
            self._end = end
        self._scope.cancel()

    def _count_up(self, count: int) -> None:
        self.up += count
        self._extend_deadline(count)

    def _count_down(self, count: int) -> None:
        self.down += count
        self._extend_deadline(count)

    def _extend_deadline(self, count: int) -> None:
        """Bytes moved, or one side ended (0): after the first end, `linger` seconds may pass from byte to byte."""
        self._lingering = self._lingering or not count
        if self._lingering:
            self._scope.deadline = trio.current_time() + self._linger

    async def _close_now(self) -> None:
        """Close both streams without waiting, a socket with a reset if the relay was reset or if the socket was not
        told the end of the other side. Harmless after a regular close.
        """
        with trio.CancelScope(shield=True):
            for side, stream in ((Side.VISITOR, self._visitor), (Side.SERVER, self._server)):
                is_cut = self._end.cause is Cause.RESET or side not in self.told_end
                if is_cut and isinstance(stream, trio.SocketStream):
                    reset_on_close(stream.socket)  # other streams cannot be reset
                with contextlib.suppress(*STREAM_ERRORS):
                    await trio.aclose_forcefully(stream)


def os_error(error: BaseException) -> OSError | None:
    """Return the OSError in the chain of causes of one of Trio's exceptions, or None."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__
    return cause
