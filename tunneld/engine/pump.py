"""The Linux engine: one Trio task that moves the bytes of every relay and every carrier.

A naive relay has two tasks per connection; each read and write then costs a task switch and an `epoll_ctl` as well, and
these cost more than the bytes. Here one task owns one epoll set of handlers. It sleeps until the set itself is
readable, and serves every ready handler before it returns to Trio's scheduler.

**Edge-triggered, registered once.** Every socket is registered once, for all events, edge-triggered. From then on the
pump only calls `epoll_wait`. A handler knows what its socket waits for, and an event is only a hint to try. An event
that comes too often, too late, or for a descriptor that was closed and reused within the same batch does no harm: the
system call that follows says EAGAIN. An event for a descriptor without a handler is dropped.

**The kernel keeps the ready list.** A handler that stops before its socket is drained (its quantum is used up, its
batch of accepts is full, its back-off is over) must not wait for an edge that has passed already. It calls `rearm`
(`EPOLL_CTL_MOD`), which makes epoll test the socket again and put it behind all other ready ones. `attach` does the
same for a socket that was watched before: everything that is pending is reported again, with all flags. So the pump
needs no queues, and no handler can starve another one.

**Quanta.** A batch should move about `turn_size` bytes; each handler gets an equal part, at least one buffer. If a
handler rearms itself, the next batch follows at once, since a trip through Trio's scheduler costs about 30 µs. For the
same reason a process that only relays waits a moment in `epoll_wait` (`poll_timeout`) before it makes that trip: often
the answer arrives by then. After `turn_time` the pump returns to the scheduler in any case, so the control protocol
waits a few milliseconds at worst.

**Cost.** Bytes do not tell what small messages cost. Carriers count that in units, and all carriers of one owner
share a part of each turn: see budget.py.

**Sleeping costs, too.** A processor that fell asleep takes as long to wake up as some requests take to serve. Between
processes that hand work to each other this adds up: a quarter of two processors was idle. So the pump polls during the
beginning of a wait (`busy_poll`), and yields the processor between polls. It does so only while this pays, that is if
the last wait was as short.

**Detached is not closed.** A parked connection is watched, released and joined within microseconds. `detach` therefore
leaves the registration in the epoll set, without a handler. The next handler of the descriptor rearms it; if there is
none and an event comes, the pump removes the registration then. Closing a socket removes it without a system call; a
handler that closes its socket calls `remove` first.

**Callbacks** run in this task or in that of the timers. `on_end` callbacks run after the batch, so that an owner may
call the engine again. Handlers that write to one carrier have it flushed after the batch, in one system call
(`call_after_batch`).

    run
    ├─ serve                 sleeps in wait_readable(epoll)
    └─ timers                half-closed relays, acceptors that back off, `on_end` of dropped relays
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
from collections.abc import Callable
from time import perf_counter
from typing import Any, Final, Protocol, cast

import trio

from tunneld.engine.acceptor import Acceptor, FdReserve, SocketWatch
from tunneld.engine.end import End
from tunneld.engine.engine import FailureCallback, Limiter, Registration, Relay, RelayEnd
from tunneld.engine.failures import report_failure
from tunneld.engine.handover import RelayState
from tunneld.engine.limits import MIB, EngineLimits
from tunneld.engine.pipes import PipePool
from tunneld.engine.relay import JoinedEnds
from tunneld.engine.scheduler import Scheduler
from tunneld.engine.socket_end import SocketEnd
from tunneld.engine.throttle import Throttle, TokenBucket
from tunneld.log import Logger

EPOLL_MASK: Final = select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLPRI | select.EPOLLET
"What every socket is registered for."

MAX_BATCH_EVENTS: Final = 256
"Events taken per `epoll_wait`: enough that the scheduler's share of each is negligible, few enough to return soon."

log = Logger("engine")


class Handler(Protocol):
    """The owner of a descriptor in the pump."""

    def on_event(self, events: int) -> None:
        """An event may have happened (epoll's flags). Try, and rely only on what the system calls return."""

    def on_failure(self, error: Exception) -> None:
        """`on_event` raised: a bug."""

    def on_stop(self) -> None:
        """The pump stops; the handler closes or releases its socket."""


class Pump(Scheduler):
    """One epoll set and its handlers. See `Engine` for the contract towards owners.

    Handlers use what `Scheduler` has and, for their descriptors, `attach`, `detach`, `remove`, `rearm`, `quantum`, and
    the shared buffers `buffer`, `view` and `wide_buffer`.
    """

    def __init__(self, limits: EngineLimits) -> None:
        """Opens nothing; `run` does."""
        super().__init__(limits)
        self.handlers: dict[int, Handler | None] = {}  # None: detached, still registered with epoll
        self.buffer = bytearray(limits.buffer_size)
        self.view = memoryview(self.buffer)
        self.fd_reserve = FdReserve(limits.descriptors)
        self.pipes = PipePool(limits.pipe_size, limits.max_pipes, limits.buffer_size, limits.descriptors)
        self._wide_buffer: bytearray | None = None
        sizes = range(MAX_BATCH_EVENTS + 1)
        self._quanta = [max(limits.buffer_size, limits.turn_size // (size or 1)) for size in sizes]  # by batch size
        self._poll_at_once = False  # a handler has rearmed itself
        self._last_wait_was_short = False
        self._epoll: select.epoll | None = None

    @property
    def wide_buffer(self) -> bytearray:
        """A buffer for handlers that read more at once than a flow: carriers. Valid until another handler reads."""
        if self._wide_buffer is None:  # a process without carriers never needs it
            self._wide_buffer = bytearray(self.limits.wide_size)
        return self._wide_buffer

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """See `Engine.run`."""
        with select.epoll() as self._epoll:
            try:
                async with trio.open_nursery() as self._nursery:
                    self._nursery.start_soon(self.timers.run)
                    self._nursery.start_soon(self._serve, self._epoll)
                    task_status.started()
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
        visitor: socket.socket | End,
        server: socket.socket | End,
        *,
        linger: float,
        on_end: Callable[[Relay, RelayEnd], None],
        throttle: Limiter | None = None,
        early: bytes = b"",
    ) -> Relay:
        """See `Engine.join`."""
        if self._epoll is None:
            raise RuntimeError("the engine is not running")
        one = visitor if isinstance(visitor, End) else SocketEnd(self, visitor)
        other = server if isinstance(server, End) else SocketEnd(self, server)
        relay = JoinedEnds(self, one, other, linger, on_end, throttle)
        relay.start(early)
        return relay

    def export_relay(self, relay: Relay) -> RelayState | None:
        """See `Engine.export_relay`. Only relays between two sockets can be exported."""
        return relay.export() if isinstance(relay, JoinedEnds) else None

    def import_relay(
        self, state: RelayState, *, on_end: Callable[[Relay, RelayEnd], None], throttle: Limiter | None = None
    ) -> Relay:
        """See `Engine.import_relay`."""
        relay = self.join(state.visitor, state.server, linger=state.linger, on_end=on_end, throttle=throttle)
        cast("JoinedEnds", relay).restore(state)
        return relay

    def limit(
        self,
        rate: float | None,
        quota: int | None,
        on_used_up: Callable[[], None],
        shared: TokenBucket | None = None,
    ) -> Limiter:
        """See `Engine.limit`."""
        return Throttle(rate, quota, self.timers, on_used_up, shared)

    def attach(self, fd: int, handler: Handler) -> None:
        """Make `handler` the owner of `fd`; epoll reports everything that is pending already.

        Raises OSError if the descriptor is closed, and RuntimeError outside `run`.
        """
        epoll = self._epoll or self._epoll_set()
        if fd < 0:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        if fd in self.handlers:
            try:
                epoll.modify(fd, EPOLL_MASK)
            except FileNotFoundError:  # it was closed, and the number was reused
                epoll.register(fd, EPOLL_MASK)
        else:
            epoll.register(fd, EPOLL_MASK)
        self.handlers[fd] = handler

    def detach(self, fd: int, handler: Handler) -> None:
        """Send no more events of `fd` to `handler`. The registration stays for the next handler of the socket."""
        if self.handlers.get(fd) is handler:
            self.handlers[fd] = None

    def remove(self, fd: int, handler: Handler) -> None:
        """Forget `fd` before `handler` closes it. Does nothing if another handler owns the number by now."""
        if self.handlers.get(fd) is handler:
            del self.handlers[fd]

    def unregister(self, fd: int, handler: Handler) -> None:
        """Forget a listener before `handler` closes it or leaves it to another owner. Another descriptor may share it,
        which keeps its registration in the kernel alive. Does nothing if another handler owns the number by now.
        """
        if self.handlers.get(fd) is handler:
            del self.handlers[fd]
            with contextlib.suppress(OSError, RuntimeError):  # closed already, or the pump has ended
                self._epoll_set().unregister(fd)

    def rearm(self, fd: int) -> None:
        """Let epoll report pending events of `fd` again, behind all ready sockets. Does nothing on a closed one, and
        while the pump stops.
        """
        self._poll_at_once = True
        if self._epoll is not None:
            with contextlib.suppress(OSError):
                self._epoll.modify(fd, EPOLL_MASK)

    def _epoll_set(self) -> select.epoll:
        """The epoll set. Raises RuntimeError outside `run`."""
        if self._epoll is None:
            raise RuntimeError("the engine is not running")
        return self._epoll

    async def _serve(self, epoll: select.epoll) -> None:
        """Sleep until a socket is ready, take a turn, return to Trio's scheduler; until cancelled."""
        fd = epoll.fileno()
        keep_freed_memory()
        while True:
            if self.budget.deferred or self._soon:
                await trio.lowlevel.checkpoint()
            else:
                await trio.lowlevel.wait_readable(fd)
            self._take_turn(epoll)

    def _take_turn(self, epoll: select.epoll) -> None:
        """Continue deferred handlers, then serve batches until no socket is ready within `poll_timeout`, or `turn_time`
        is over.
        """
        end = perf_counter() + self.limits.turn_time
        self.budget.begin_turn()
        if self.budget.deferred:
            self._continue_deferred()
        self._poll_at_once = True
        while True:
            at_once = self._poll_at_once or self._soon or self.budget.deferred
            batch = epoll.poll(0, MAX_BATCH_EVENTS) if at_once else self._wait(epoll)
            if not batch and not self._soon:
                break
            self._poll_at_once = False
            self._dispatch(batch)
            if perf_counter() >= end:
                break
        self.budget.in_turn = False

    def _wait(self, epoll: select.epoll) -> list[tuple[int, int]]:
        """Return the events that are ready or come within `poll_timeout`: polling at first, if the last wait was
        short, and then asleep.
        """
        limits = self.limits
        batch = epoll.poll(0, MAX_BATCH_EVENTS)
        if not limits.poll_timeout:
            return batch
        began = perf_counter()
        while not batch and self._last_wait_was_short and perf_counter() - began < limits.busy_poll:
            os.sched_yield()
            batch = epoll.poll(0, MAX_BATCH_EVENTS)
        if not batch:
            batch = epoll.poll(limits.poll_timeout, MAX_BATCH_EVENTS)
        self._last_wait_was_short = perf_counter() - began < limits.busy_poll
        return batch

    def _dispatch(self, batch: list[tuple[int, int]]) -> None:
        """Serve one batch: call every handler with its event, then the callbacks that are due after it."""
        handlers = self.handlers
        self._batch_time = None
        self._in_batch = True
        self.quantum = self._quanta[len(batch)]
        for fd, events in batch:
            handler = handlers.get(fd)
            if handler is None:
                self._unregister(fd)
                continue
            try:
                handler.on_event(events)
            except Exception as error:
                report_failure(handler.on_failure, error)
        if self._soon:
            self.serve_flows()
        if self._ended or self._after_batch:
            self.finish_batch()
        self._in_batch = False

    def on_wake(self) -> None:
        """See `Scheduler.on_wake`. Handlers that were deferred between turns get one here."""
        super().on_wake()
        if self.budget.deferred and not self.budget.in_turn:
            self.budget.begin_turn()
            self._continue_deferred()
            self.budget.in_turn = False
            if self.budget.deferred:
                self.timers.wake_soon()

    def _continue_deferred(self) -> None:
        """Serve the handlers that used up their owners' shares of the last turn."""
        self._batch_time = None
        self._in_batch = True
        self.quantum = self.buffer_size
        self.budget.continue_deferred()
        self.finish_batch()
        self._in_batch = False

    def _unregister(self, fd: int) -> None:
        """Remove a descriptor that has an event and no handler: detached, or closed earlier in this batch."""
        self.handlers.pop(fd, None)
        with contextlib.suppress(OSError):
            self._epoll_set().unregister(fd)

    def _stop(self) -> None:
        """Drop every relay and release every registration."""
        self._epoll = self._nursery = None
        self.drop_relays()
        for handler in list(self.handlers.values()):
            if handler is not None:
                handler.on_stop()
        self.handlers.clear()
        self.finish_batch()
        self.pipes.close()


def keep_freed_memory() -> None:
    """Make malloc keep some freed memory instead of returning it to the kernel after each buffer of a carrier.

    glibc keeps more, twice as much, once a large block has been freed (M_MMAP_THRESHOLD in mallopt(3)). Without this,
    if buffers happen to be last on the heap, each one takes fresh pages that the kernel zeroes: half the cost of TLS.
    """
    bytearray(MIB)
