"""The portable relay: two copying tasks between any two Trio streams.

    StreamRelay.run
    ├─ visitor -> server       receive_some, send_all, and so on; at the end send_eof
    └─ server -> visitor       the same

Backpressure is `send_all`: nothing is read while a chunk is on its way, so a direction holds one chunk. The price is
that a reset of its source is not noticed meanwhile. Cancelling `run` closes both streams without ceremony, and so does
every end but a good one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import trio
from trio.abc import HalfCloseableStream

from tunneld.engine.engine import Cause, RelayEnd, Side
from tunneld.engine.failures import reset_on_close
from tunneld.engine.throttle import PatientThrottle

CHUNK = 64 * 1024
"Bytes read at a time, and so the most that a stopped direction holds."

BROKEN = (trio.BrokenResourceError, trio.ClosedResourceError)


class SideBrokenError(Exception):
    """One side of a copy is broken; the cause says how."""

    def __init__(self, side: Side) -> None:
        super().__init__(f"{side.value} side broke")
        self.side = side


async def copy(
    source: HalfCloseableStream,
    target: HalfCloseableStream,
    sides: tuple[Side, Side],
    on_moved: Callable[[int], None],
    throttle: PatientThrottle | None = None,
) -> None:
    """Copy until the end of `source` and pass that on, too; as fast and as much as `throttle` allows.

    `on_moved` hears of the size of every delivered chunk, and of 0 when the end is read.

    Raises SideBrokenError with the one of `sides` (source's, target's) that broke.
    """
    while True:
        try:
            chunk = await source.receive_some(CHUNK)
        except BROKEN as error:
            raise SideBrokenError(sides[0]) from error
        try:
            if not chunk:
                on_moved(0)
                await target.send_eof()
                return
            while chunk:
                count = len(chunk) if throttle is None else await throttle.pay(len(chunk))
                await target.send_all(chunk[:count])
                on_moved(count)
                chunk = chunk[count:]
        except BROKEN as error:
            raise SideBrokenError(sides[1]) from error


class StreamCopier:
    """Two streams joined by two tasks. See `Relay` for `up` and `down`."""

    def __init__(
        self,
        visitor: HalfCloseableStream,
        server: HalfCloseableStream,
        *,
        linger: float,
        throttle: PatientThrottle | None = None,
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

    async def run(self) -> RelayEnd:
        """Relay until both directions ended, then close both streams.

        Raises what a stream raises beyond Trio's own BrokenResourceError and ClosedResourceError: a bug in it.
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
                with trio.move_on_after(self._linger), contextlib.suppress(*BROKEN):
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
        """One direction; what stops it stops the other, except a good end."""
        try:
            await copy(source, target, sides, count, self._throttle)
        except SideBrokenError as broke:
            self._finish(RelayEnd(Cause.RESET, broke.side, os_error(broke)))
        except Exception as error:
            self._bug = self._bug or error
            self._scope.cancel()

    def _finish(self, end: RelayEnd) -> None:
        """The first reason counts."""
        if self._end.cause is Cause.FINISHED:
            self._end = end
        self._scope.cancel()

    def _count_up(self, count: int) -> None:
        self.up += count
        self._put_off(count)

    def _count_down(self, count: int) -> None:
        self.down += count
        self._put_off(count)

    def _put_off(self, count: int) -> None:
        """Bytes moved, or one side ended (0): from then on there are `linger` seconds from byte to byte."""
        self._lingering = self._lingering or not count
        if self._lingering:
            self._scope.deadline = trio.current_time() + self._linger

    async def _close_now(self) -> None:
        """Close both without ceremony; with a reset where a reset is what happened. Harmless after a good close."""
        with trio.CancelScope(shield=True):
            for stream in (self._visitor, self._server):
                if self._end.cause is Cause.RESET and isinstance(stream, trio.SocketStream):
                    reset_on_close(stream.socket)  # other streams have no word for it
                with contextlib.suppress(*BROKEN):
                    await trio.aclose_forcefully(stream)


def os_error(error: BaseException) -> OSError | None:
    """The operating system's error behind one of Trio's, if there is any."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__
    return cause
