"""The Linux engine: one Trio task that moves every byte between plain sockets.

The naive relay has two tasks a connection; each byte then costs a task switch and an `epoll_ctl` on top of the read and
the write, and those two cost more than the bytes. Here one task owns one epoll set of handlers, sleeps until the set
itself is readable, and serves every ready handler before it goes back to Trio's scheduler.

**Edges, told once.** Every socket is registered once, for everything, edge-triggered. From then on nothing is asked of
epoll but `poll`; the handler knows what its socket is waiting for, and an event is only a hint to go and try. So an
event that comes too often, too late, or for a descriptor that was closed and given out again within the same batch does
no harm: the system call that follows says EAGAIN. An event whose descriptor has no handler is dropped.

**The kernel keeps the ready list.** Whoever stops before its socket is drained (its share of the wake-up is used up,
its batch of accepts is full, its rest is over) must not wait for an edge that has already passed. It is armed again
(`EPOLL_CTL_MOD`), which makes epoll look anew and put it behind all others that are ready. `join` does the same with
sockets that were watched before: whatever stands in them is told again, flags and all. Hence no queues here, and nobody
can starve.

**Shares.** A batch may move about `turn_size` bytes; each handler gets its part, at least a buffer. Where somebody had
to stop, the next batch follows at once, since a trip through Trio's scheduler costs some 30 µs. For the same reason a
relay's process dozes a moment in `epoll_wait` before it makes that trip: the answer is often there by then. After
`turn_time` Trio has its turn all the same: the control protocol waits a few milliseconds at worst.

**Waiting costs, too.** A processor that fell asleep takes as long to wake up as some visitors take to serve, and
between processes that hand work to each other this adds up: a quarter of two processors did nothing at all. So the
beginning of a doze is spent looking (`spin`), giving way to whoever wants the processor, as long as this pays: only if
the last wait was over as soon.

**Released is not closed.** A parked connection is watched, released and joined within microseconds. `release` therefore
leaves the registration in the epoll set, only without a handler. The next owner of the descriptor re-arms it; if none
comes and it still stirs, it is taken out then. Closing a socket removes it by itself.

**Callbacks** run from this task or its sibling, the timers. Ends are told after the batch, so that an owner may do what
it likes. What many handlers write to one place (a carrier) is written after the batch, too, and then all at once.

    run
    ├─ the pump itself       sleeps in wait_readable(epoll)
    └─ timers                lingering relays, resting acceptors, drops to be told
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
from collections.abc import Callable
from time import perf_counter
from typing import Any, Protocol, cast

import structlog
import trio

from tunneld.engine.acceptor import Acceptor, FdReserve, SocketWatch
from tunneld.engine.engine import FailureCallback, Limiter, Registration, Relay, RelayEnd
from tunneld.engine.failures import tell_failure
from tunneld.engine.handover import RelayState
from tunneld.engine.limits import MIB, EngineLimits
from tunneld.engine.pipes import Pipes
from tunneld.engine.socket_relay import SocketRelay
from tunneld.engine.throttle import Throttle
from tunneld.engine.timers import Timers

EVERYTHING = select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLPRI | select.EPOLLET

BATCH = 256
"Events taken per wake-up. Enough to make the scheduler's share of each negligible, few enough to come back soon."

log = structlog.get_logger("relay")


class Handler(Protocol):
    """What the pump knows about the owner of a descriptor."""

    def on_event(self, events: int) -> None:
        """Something may have happened (epoll's flags); try, and believe only the system calls."""

    def on_failure(self, error: Exception) -> None:
        """`on_event` raised."""

    def on_stop(self) -> None:
        """The pump stops; the handler removes itself."""


class EndedRelay(Protocol):
    """A relay whose owner is to be told."""

    def notify_ended(self, how: RelayEnd) -> None:
        """Tell it; raises nothing."""


class Pump:
    """One epoll set and all that lives in it. See `Engine` for the contract."""

    def __init__(self, limits: EngineLimits) -> None:
        """Nothing is opened before `run`."""
        self.limits = limits
        self.handlers: dict[int, Handler | None] = {}  # None: released, its registration stands
        self.buffer_size = limits.buffer_size
        self.buffer = bytearray(limits.buffer_size)
        self.view = memoryview(self.buffer)
        self.quantum = limits.turn_size
        self.fd_reserve = FdReserve(limits.descriptors)
        self.pipes = Pipes(limits.pipe_size, limits.max_pipes, least=limits.buffer_size, below=limits.descriptors)
        self.ended_relays: list[tuple[EndedRelay, RelayEnd]] = []
        self.timers = Timers(self._finish_batch)
        self._later: list[Callable[[], None]] = []
        self._in_batch = False
        self._time: float | None = None  # Trio's, as somebody in this batch has asked for it
        self._wide: bytearray | None = None
        self._armed = False  # somebody has more to do
        self._brisk = False  # the last wait was a short one
        self._epoll: select.epoll | None = None

    @property
    def wide_buffer(self) -> bytearray:
        """For handlers that read more at once than a flow: carriers. Overwritten by whoever reads next."""
        if self._wide is None:  # where no carriers are, nobody needs it
            self._wide = bytearray(self.limits.wide_size)
        return self._wide

    def now(self) -> float:
        """Trio's time, in seconds; within a batch it is asked for once, by the first who wants it."""
        if not self._in_batch:
            return trio.current_time()
        if self._time is None:
            self._time = trio.current_time()
        return self._time

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """See `Engine.run`."""
        with select.epoll() as self._epoll:
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self.timers.run)
                    task_status.started()
                    await self._turn_for_ever(self._epoll)
            finally:
                self._stop()

    def listen(
        self, listener: socket.socket, on_connection: Callable[[socket.socket, Any], None], on_failure: FailureCallback
    ) -> Registration:
        """See `Engine.listen`."""
        acceptor = Acceptor(self, listener, on_connection, on_failure)
        self.attach(listener.fileno(), acceptor)
        return acceptor

    def watch(
        self, connection: socket.socket, on_event: Callable[[], None], on_failure: FailureCallback
    ) -> Registration:
        """See `Engine.watch`."""
        watch = SocketWatch(self, connection.fileno(), on_event, on_failure)
        self.attach(connection.fileno(), watch)
        return watch

    def join(
        self,
        visitor: socket.socket,
        server: socket.socket,
        *,
        linger: float,
        on_end: Callable[[Relay, RelayEnd], None],
        throttle: Limiter | None = None,
    ) -> Relay:
        """See `Engine.join`."""
        return self._attach(SocketRelay(self, visitor, server, linger, on_end, cast("Throttle | None", throttle)))

    def export_relay(self, relay: Relay) -> RelayState | None:
        """See `Engine.lift`."""
        if not isinstance(relay, SocketRelay) or relay.over:
            return None
        return relay.export()

    def import_relay(
        self, lifted: RelayState, *, on_end: Callable[[Relay, RelayEnd], None], throttle: Limiter | None = None
    ) -> Relay:
        """See `Engine.put_down`."""
        pair = SocketRelay(
            self, lifted.visitor, lifted.server, lifted.linger, on_end, cast("Throttle | None", throttle)
        )
        pair.restore(lifted)
        return self._attach(pair)

    def _attach(self, pair: SocketRelay) -> SocketRelay:
        for flow in (pair.from_visitor, pair.from_server):
            try:
                self.attach(flow.fd, flow)
            except OSError as error:
                pair.fail_side(flow.side, error)
                self.timers.wake_soon()
                break
        return pair

    def attach(self, fd: int, handler: Handler) -> None:
        """Make `handler` the owner of `fd`; epoll tells what stands there already. Raises OSError if it is closed."""
        epoll = self._running()
        if fd < 0:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        if fd in self.handlers:
            try:
                epoll.modify(fd, EVERYTHING)
            except FileNotFoundError:  # closed since, and the number was given out again
                epoll.register(fd, EVERYTHING)
        else:
            epoll.register(fd, EVERYTHING)
        self.handlers[fd] = handler

    def limit(self, rate: float | None, quota: int | None, on_used_up: Callable[[], None]) -> Limiter:
        """See `Engine.limit`."""
        return Throttle(rate, quota, self.timers, on_used_up)

    def detach(self, fd: int, handler: Handler) -> None:
        """The handler wants no more events of `fd`; the registration stands for whoever comes next."""
        if self.handlers.get(fd) is handler:
            self.handlers[fd] = None

    def rearm(self, fd: int) -> None:
        """Let epoll tell again what stands in `fd`, behind whoever is ready already. Harmless on a closed one."""
        self._armed = True
        with contextlib.suppress(OSError):
            self._running().modify(fd, EVERYTHING)

    def call_after_batch(self, callback: Callable[[], None]) -> None:
        """Call it, once, when everything that is ready now has been served. It raises nothing; what it raises all the
        same is logged, and nobody else notices.
        """
        self._later.append(callback)
        if not self._in_batch:
            self.timers.wake_soon()

    def _running(self) -> select.epoll:
        """The epoll set. Raises RuntimeError outside `run`."""
        if self._epoll is None:
            raise RuntimeError("engine cannot take sockets: it is not running")
        return self._epoll

    async def _turn_for_ever(self, epoll: select.epoll) -> None:
        """Sleep until something is ready, serve it, let Trio have its turn, and so on."""
        fd = epoll.fileno()
        keep_memory_at_hand()
        while True:
            await trio.lowlevel.wait_readable(fd)
            self._turn(epoll)

    def _turn(self, epoll: select.epoll) -> None:
        """Serve who is ready, whoever has more and who comes while we doze, until the turn is over."""
        end = perf_counter() + self.limits.turn_time
        self._armed = True
        while batch := epoll.poll(0, BATCH) if self._armed else self._wait(epoll):
            self._armed = False
            self._serve(batch)
            if perf_counter() >= end:
                return

    def _wait(self, epoll: select.epoll) -> list[tuple[int, int]]:
        """Who is ready now or comes while we doze: looking first, if that paid the last time, and then asleep."""
        limits = self.limits
        batch = epoll.poll(0, BATCH)
        if not limits.poll_timeout:
            return batch
        began = perf_counter()
        while not batch and self._brisk and perf_counter() - began < limits.busy_poll:
            os.sched_yield()
            batch = epoll.poll(0, BATCH)
        if not batch:
            batch = epoll.poll(limits.poll_timeout, BATCH)
        self._brisk = perf_counter() - began < limits.busy_poll
        return batch

    def _serve(self, batch: list[tuple[int, int]]) -> None:
        """One wake-up: every handler that epoll told of, then the owners whose relays ended."""
        handlers = self.handlers
        self._time = None
        self._in_batch = True
        self.quantum = max(self.buffer_size, self.limits.turn_size // (len(batch) or 1))
        for fd, events in batch:
            handler = handlers.get(fd)
            if handler is None:
                self._forget(fd)
                continue
            try:
                handler.on_event(events)
            except Exception as error:
                tell_failure(handler.on_failure, error)
        if self.ended_relays or self._later:
            self._finish_batch()
        self._in_batch = False

    def _forget(self, fd: int) -> None:
        """A descriptor stirs that nobody owns: released, or closed earlier in this batch."""
        self.handlers.pop(fd, None)
        with contextlib.suppress(OSError):
            self._running().unregister(fd)

    def _finish_batch(self) -> None:
        """Write what was gathered, tell the owners of the relays that have ended; either may bring more of both."""
        while self.ended_relays or self._later:
            later, self._later = self._later, []
            for callback in later:
                try:
                    callback()
                except Exception as error:
                    log.exception("could not write what was gathered: a bug", exc_info=error)
            ended, self.ended_relays = self.ended_relays, []
            for relay, how in ended:
                relay.notify_ended(how)

    def _stop(self) -> None:
        """Drop every relay and release every registration."""
        self._epoll = None
        for handler in list(self.handlers.values()):
            if handler is not None:
                handler.on_stop()
        self.handlers.clear()
        self._finish_batch()
        self.pipes.close()


def keep_memory_at_hand() -> None:
    """Have malloc keep some freed memory rather than give it back to the kernel after every buffer of a carrier.

    glibc starts to keep more (twice as much) when a large block is freed, see M_MMAP_THRESHOLD in mallopt(3). Without
    this, where buffers happen to be the last of the heap, each comes as fresh pages, zeroed: half of what TLS costs.
    """
    bytearray(MIB)
