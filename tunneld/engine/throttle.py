"""Bandwidth and quota of a tunnel: a token bucket that its relays share fairly.

A token is one byte, of either direction. Before a flow reads, it takes a *quantum* of tokens and then reads no more
than that. If the bucket holds less than a quantum, the flow joins a queue and reads nothing, so flow control stops its
sender; it gets its quantum when its turn comes. All quanta have the same size and a flow has one place in the queue for
each direction. So N busy flows get a Nth of the rate each, a flow that wants little gets it after at most one round,
and what a flow does not use is left to the remaining ones.

    bytes in any t seconds  <=  rate * t + burst

The quantum is small when the rate is low, so that a round is short: the bytes of a twentieth of a second, within
bounds. The burst is the bytes of a tenth of a second, which is longer than the engine's timers take to notice a
deadline.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

import trio

from tunneld.engine.timers import Timers

MIN_QUANTUM, MAX_QUANTUM = 512, 16 * 1024
"""Bytes. A smaller quantum would spend all time in system calls; a larger one would make the queue noticeably slow at a
few hundred KiB per second.
"""
QUANTUM_SECONDS: Final = 0.05
"""A quantum is the bytes of this many seconds."""
BURST_SECONDS: Final = 0.1
"""A full bucket is the bytes of this many seconds."""
MIN_WAIT: Final = 0.001
"""Seconds. The missing tokens may be too few for a float to show that time passes."""


class TokenBucket:
    """Tokens that accrue at a rate, and a quota of them. Pure: the time is an argument."""

    def __init__(self, rate: float | None, quota: int | None, now: float) -> None:
        """`rate` in bytes per second and `quota` in bytes, at least 1; None means no such limit."""
        self.left = quota
        self._set_rate(rate)
        self._tokens = self.size
        self._filled_at = now

    def change(self, rate: float | None, left: int | None) -> None:
        """Have another rate, and so many bytes left of the quota, from now on."""
        self.left = left
        self._set_rate(rate)

    def _set_rate(self, rate: float | None) -> None:
        self.rate = rate
        self.quantum = MAX_QUANTUM if rate is None else int(max(MIN_QUANTUM, min(QUANTUM_SECONDS * rate, MAX_QUANTUM)))
        self.size = 0.0 if rate is None else max(BURST_SECONDS * rate, self.quantum)

    def take(self, now: float, max_bytes: int = MAX_QUANTUM) -> int:
        """Take a quantum, or `max_bytes`, or the rest of the quota, whichever is least, and return its size.

        Returns 0, and takes nothing, if the bucket holds less or the quota is used up.
        """
        count = min(max_bytes, self.quantum)
        if self.left is not None:
            count = min(count, self.left)
        if self.rate is not None:
            self._tokens = min(self.size, self._tokens + (now - self._filled_at) * self.rate)
            self._filled_at = now
            if self._tokens < count:
                return 0
            self._tokens -= count
        if self.left is not None:
            self.left -= count
        return count

    def give_back(self, count: int) -> None:
        """Return tokens that were taken and not used."""
        self._tokens = min(self.size, self._tokens + count)
        if self.left is not None:
            self.left += count

    @property
    def used_up(self) -> bool:
        """Whether the quota is used up."""
        return self.left == 0

    @property
    def wait(self) -> float:
        """Seconds from the last `take` until the bucket holds a quantum; at least `MIN_WAIT`."""
        return MIN_WAIT if self.rate is None else max(MIN_WAIT, (self.quantum - self._tokens) / self.rate)


class SharedBucket:
    """The bucket of one tunnel, and the one that all tunnels of its owner share."""

    def __init__(self, own: TokenBucket, shared: TokenBucket | None) -> None:
        """`shared` is None where the owner has no limit."""
        self._own = own
        self._shared = shared

    def change(self, rate: float | None, left: int | None) -> None:
        """See `TokenBucket.change`; the bucket of the owner stays."""
        self._own.change(rate, left)

    @property
    def left(self) -> int | None:
        """See `TokenBucket.left`."""
        return self._own.left

    @property
    def used_up(self) -> bool:
        """See `TokenBucket.used_up`."""
        return self._own.used_up

    @property
    def wait(self) -> float:
        """Seconds from the last `take` until both buckets hold a quantum, as far as is known."""
        return self._own.wait if self._shared is None else max(self._own.wait, self._shared.wait)

    def take(self, now: float, max_bytes: int = MAX_QUANTUM) -> int:
        """See `TokenBucket.take`: what both buckets allow."""
        count = self._own.take(now, max_bytes)
        if not count or self._shared is None:
            return count
        allowed = self._shared.take(now, count)
        self._own.give_back(count - allowed)
        return allowed

    def give_back(self, count: int) -> None:
        """Return tokens that were taken and not used."""
        self._own.give_back(count)
        if self._shared is not None:
            self._shared.give_back(count)


class Throttle:
    """The bucket of one tunnel in the pump, and the queue of flows that wait for tokens."""

    def __init__(
        self,
        rate: float | None,
        quota: int | None,
        timers: Timers,
        on_used_up: Callable[[], None],
        shared: TokenBucket | None = None,
    ) -> None:
        """`on_used_up` is called when a flow asks for more than the quota, perhaps more than once. `shared` is the
        bucket that other throttles use, too.
        """
        self.bucket = SharedBucket(TokenBucket(rate, quota, trio.current_time()), shared)
        self.deadline = 0.0
        self._timers = timers
        self._on_used_up = on_used_up
        self._queue: deque[Allowance] = deque()

    @property
    def left(self) -> int | None:
        """Bytes left of the quota, or None if there is no quota."""
        return self.bucket.left

    def change(self, rate: float | None, left: int | None) -> None:
        """See `Limiter.change`. Flows that wait for tokens are served with the next deadline."""
        self.bucket.change(rate, left)

    def take(self, allowance: Allowance) -> int:
        """Return a quantum now, or put the allowance into the queue and return 0."""
        count = 0 if self._queue else self.bucket.take(trio.current_time())
        if not count:
            if self.bucket.used_up:
                self._on_used_up()
            self._queue.append(allowance)
            if len(self._queue) == 1:
                self._set_timer()
        return count

    def remove(self, allowance: Allowance) -> None:
        """Take the allowance of an ended relay out of the queue, if it is there."""
        if allowance in self._queue:
            self._queue.remove(allowance)

    def on_deadline(self) -> None:
        """Serve the queue as far as the tokens reach."""
        now = trio.current_time()
        while self._queue:
            count = self.bucket.take(now)
            if not count:
                self._set_timer()
                return
            self._queue.popleft().grant(count)

    def _set_timer(self) -> None:
        if not self.bucket.used_up:
            self.deadline = trio.current_time() + self.bucket.wait
            self._timers.watch(self)


class Allowance:
    """The bytes that one direction of one relay may pass now."""

    __slots__ = ("_resume", "_throttle", "left", "waiting")

    def __init__(self, throttle: Throttle, resume: Callable[[], None]) -> None:
        """`resume` is called when `get` has returned 0 and tokens have been granted since."""
        self.left = 0
        self.waiting = False
        self._throttle = throttle
        self._resume = resume

    def get(self) -> int:
        """Return the number of bytes that may pass now. After 0, `resume` is called once that changes."""
        if not self.left and not self.waiting:
            self.left = self._throttle.take(self)
            self.waiting = not self.left
        return self.left

    def use(self, count: int) -> None:
        """`count` bytes have passed."""
        self.left -= count

    def grant(self, count: int) -> None:
        """Add tokens and resume the flow. Called by the throttle when the allowance reaches the head of the queue."""
        self.waiting = False
        self.left += count
        self._resume()

    def give_back(self) -> None:
        """Return the unused tokens, since no data is there to pass."""
        if self.left:
            self._throttle.bucket.give_back(self.left)
            self.left = 0

    def close(self) -> None:
        """The relay has ended: return the tokens and leave the queue. May be called again."""
        self.give_back()
        self._throttle.remove(self)
        self.waiting = True
