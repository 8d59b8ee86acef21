"""An asyncio event loop that runs as one Trio task, for asyncssh.

asyncssh needs futures, tasks and timers of asyncio, and no asyncio I/O: its sockets are in the pump. This loop offers
exactly that. A general bridge (trio-asyncio) depends on asyncio's selector loop and on event loop policies, which
Python 3.14 deprecates; this needs only `AbstractEventLoop` and the two functions that asyncio documents for authors of
event loops.

    call_soon, call_at ──► ready queue, timer heap ──► `run`: one batch of callbacks ──► Trio's scheduler

Callbacks run between two Trio checkpoints, and asyncio's running loop is set only then: Trio code never sees it.
Everything runs in Trio's thread; there is no `call_soon_threadsafe`. Methods that are not implemented raise
NotImplementedError, as in `AbstractEventLoop`.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import math
from asyncio.events import _get_running_loop, _set_running_loop
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Generator
from concurrent.futures import Executor
from typing import Any, TypeVar, TypeVarTuple, Unpack

import trio

T = TypeVar("T")
Ts = TypeVarTuple("Ts")
ExceptionHandler = Callable[[asyncio.AbstractEventLoop, dict[str, Any]], object]

MAX_SHUTDOWN_BATCHES = 100
"""Batches in which cancelled tasks can finish. A task that ignores its cancellation is dropped after that."""


class TrioEventLoop(asyncio.AbstractEventLoop):
    """Futures, tasks and timers of asyncio on Trio's clock. `start_loop` makes one and runs it."""

    def __init__(self, nursery: trio.Nursery, exception_handler: ExceptionHandler) -> None:
        """`nursery` owns the Trio functions that `trio_as_future` starts. `exception_handler` receives exceptions that
        no awaiting code received, as in `loop.set_exception_handler`.
        """
        self._nursery = nursery
        self._exception_handler = exception_handler
        self._ready: deque[asyncio.Handle] = deque()
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []  # a heap; the number orders equal times
        self._timer_number = 0
        self._wake_up = trio.Event()
        self._is_closed = False

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run callbacks until cancelled; then cancel the remaining asyncio tasks and let them finish."""
        task_status.started()
        try:
            while True:
                with trio.move_on_at(self._next_deadline()):
                    await self._wake_up.wait()
                await trio.lowlevel.checkpoint()
                self._run_batch()
        finally:
            self._cancel_tasks()
            self._is_closed = True

    # Callbacks and timers

    def call_soon(
        self, callback: Callable[[Unpack[Ts]], object], *args: *Ts, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        """Call `callback` in the next batch."""
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        self._wake_up.set()
        return handle

    def call_later(
        self,
        delay: float,
        callback: Callable[[Unpack[Ts]], object],
        *args: *Ts,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        """Call `callback` in `delay` seconds."""
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def call_at(
        self,
        when: float,
        callback: Callable[[Unpack[Ts]], object],
        *args: *Ts,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        """Call `callback` at `when`, a time of Trio's clock in seconds."""
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        self._timer_number += 1
        heapq.heappush(self._timers, (when, self._timer_number, handle))
        self._wake_up.set()  # the deadline of `run` may be too late now
        return handle

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Asyncio calls this when a timer is cancelled: the heap drops cancelled timers from its top."""
        self._drop_cancelled_timers()

    def time(self) -> float:
        """Trio's clock, in seconds."""
        return trio.current_time()

    # Futures and tasks

    def create_future(self) -> asyncio.Future[Any]:
        """A future of this loop."""
        return asyncio.Future(loop=self)

    def create_task(self, coro: Coroutine[Any, Any, T] | Generator[Any, None, T], **kwargs: Any) -> asyncio.Task[T]:
        """Run an asyncio coroutine. The loop cancels it when `run` ends."""
        return asyncio.Task(coro, loop=self, **kwargs)

    def trio_as_future(self, async_fn: Callable[..., Awaitable[T]], *args: Any) -> asyncio.Future[T]:
        """Run a Trio function in the loop's nursery, for asyncio code to await. Cancelling the future cancels it."""
        future = self.create_future()
        scope = trio.CancelScope()
        future.add_done_callback(lambda _: scope.cancel())
        self._nursery.start_soon(self._settle, future, scope, async_fn, args)
        return future

    async def _settle(
        self,
        future: asyncio.Future[T],
        scope: trio.CancelScope,
        async_fn: Callable[..., Awaitable[T]],
        args: tuple[Any, ...],
    ) -> None:
        with scope:
            try:
                result = await async_fn(*args)
            except Exception as error:
                if not future.done():
                    future.set_exception(error)
            except trio.Cancelled:
                future.cancel()
                raise
            else:
                if not future.done():
                    future.set_result(result)

    def run_in_executor(
        self, executor: Executor | None, func: Callable[[Unpack[Ts]], T], *args: *Ts
    ) -> asyncio.Future[T]:
        """Run `func` in a thread of Trio's; `executor` is ignored."""
        return self.trio_as_future(trio.to_thread.run_sync, func, *args)

    # State and errors

    def get_debug(self) -> bool:
        """Whether asyncio's debug mode is on: never."""
        return False

    def is_running(self) -> bool:
        """Whether `run` is running."""
        return not self._is_closed

    def is_closed(self) -> bool:
        """Whether `run` has ended."""
        return self._is_closed

    def default_exception_handler(self, context: dict[str, Any]) -> None:
        """Call the exception handler of the constructor."""
        self._exception_handler(self, context)

    call_exception_handler = default_exception_handler

    # Internals

    def _next_deadline(self) -> float:
        self._drop_cancelled_timers()
        return self._timers[0][0] if self._timers else math.inf

    def _drop_cancelled_timers(self) -> None:
        while self._timers and self._timers[0][2].cancelled():
            heapq.heappop(self._timers)

    def _run_batch(self) -> None:
        """Run the callbacks that are ready or due now. Callbacks that they schedule run in the next batch."""
        self._wake_up = trio.Event()
        now = self.time()
        while self._timers and self._timers[0][0] <= now:
            self._ready.append(heapq.heappop(self._timers)[2])
        outer_loop = _get_running_loop()  # Trio itself may run in guest mode on asyncio
        _set_running_loop(self)
        try:
            for _ in range(len(self._ready)):
                handle = self._ready.popleft()
                if not handle.cancelled():
                    handle._run()
        finally:
            _set_running_loop(outer_loop)
        if self._ready:
            self._wake_up.set()

    def _cancel_tasks(self) -> None:
        for task in asyncio.all_tasks(self):
            task.cancel()
        for _ in range(MAX_SHUTDOWN_BATCHES):
            if not self._ready:
                break
            self._run_batch()
        self._ready.clear()
        self._timers.clear()


async def start_loop(
    nursery: trio.Nursery, exception_handler: ExceptionHandler, kind: type[TrioEventLoop] = TrioEventLoop
) -> TrioEventLoop:
    """Run a new loop in `nursery`. It lives as long as that: cancelling the nursery cancels all asyncio tasks."""
    loop = kind(nursery, exception_handler)
    await nursery.start(loop.run)
    return loop
