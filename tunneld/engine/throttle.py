"""How fast and how much a tunnel may relay: a bucket of tokens that its relays share fairly, and a quota.

A token is an octet, of either direction. Whoever wants to read takes a *quantum* of them first, reads no more than
that, and comes again. Where the bucket has none it stands in line, and is given its quantum in its turn; meanwhile it
reads nothing, so its sender stops by itself. Everybody's quantum is the same and everybody has one place in the line
for each direction, so N that want all get a Nth each, one that wants little gets it after at most one round, and what
somebody does not want is the others'.

    never more, in any time of t seconds, than rate * t + burst

The quantum is small where the rate is, so that a round is short: a twentieth of a second's octets, within bounds. The
burst is what comes in a tenth of a second, which is longer than the engine's clock takes to notice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import trio

from tunneld.engine.timers import Timers

LEAST_QUANTUM, MOST_QUANTUM = 512, 16 * 1024
"""Octets: less would be all system calls; more would be felt by those in line at a few hundred KiB a second."""
ROUND = 0.05
"""Seconds' worth of octets in a quantum."""
BURST = 0.1
"""Seconds' worth of octets in a full bucket."""
TICK = 0.001
"""Seconds: what is lacking may be less than a float can tell from nothing."""


class Bucket:
    """Tokens that come at a rate, and a quota of them. Pure: time is an argument."""

    def __init__(self, rate: float | None, quota: int | None, now: float) -> None:
        """`rate` in octets per second and `quota` in octets, at least 1; None: no such limit."""
        self.rate = rate
        self.left = quota
        self.quantum = MOST_QUANTUM if rate is None else int(max(LEAST_QUANTUM, min(ROUND * rate, MOST_QUANTUM)))
        self.size = 0.0 if rate is None else max(BURST * rate, self.quantum)
        self._tokens = self.size
        self._filled_at = now

    def take(self, now: float, most: int = MOST_QUANTUM) -> int:
        """A quantum, or `most`, or the rest of the quota; 0 where the bucket holds less, or the quota is used up."""
        octets = min(most, self.quantum)
        if self.left is not None:
            octets = min(octets, self.left)
        if self.rate is not None:
            self._tokens = min(self.size, self._tokens + (now - self._filled_at) * self.rate)
            self._filled_at = now
            if self._tokens < octets:
                return 0
            self._tokens -= octets
        if self.left is not None:
            self.left -= octets
        return octets

    def give_back(self, octets: int) -> None:
        """So many were taken and not used."""
        self._tokens = min(self.size, self._tokens + octets)
        if self.left is not None:
            self.left += octets

    @property
    def used_up(self) -> bool:
        """Whether the quota is."""
        return self.left == 0

    @property
    def wait(self) -> float:
        """Seconds from the last look until there is a quantum; not so few that a clock would not see them pass."""
        return TICK if self.rate is None else max(TICK, (self.quantum - self._tokens) / self.rate)


class Throttle:
    """The bucket of one tunnel in the pump, and the line before it."""

    def __init__(self, rate: float | None, quota: int | None, timers: Timers, on_used_up: Callable[[], None]) -> None:
        """`on_used_up` is called when somebody wants more than the quota: perhaps more than once."""
        self.bucket = Bucket(rate, quota, trio.current_time())
        self.deadline = 0.0
        self._timers = timers
        self._on_used_up = on_used_up
        self._line: deque[Allowance] = deque()

    @property
    def left(self) -> int | None:
        """Octets of the quota that are left; None: there is none."""
        return self.bucket.left

    def take(self, allowance: Allowance) -> int:
        """A quantum now, unless others stand in line; otherwise 0, and a place in the line."""
        octets = 0 if self._line else self.bucket.take(trio.current_time())
        if not octets:
            if self.bucket.used_up:
                self._on_used_up()
            self._line.append(allowance)
            if len(self._line) == 1:
                self._set_clock()
        return octets

    def leave(self, allowance: Allowance) -> None:
        """A relay ended, perhaps in the line."""
        if allowance in self._line:
            self._line.remove(allowance)

    def on_deadline(self) -> None:
        """Serve the line as far as the bucket reaches."""
        now = trio.current_time()
        while self._line:
            octets = self.bucket.take(now)
            if not octets:
                self._set_clock()
                return
            self._line.popleft().go(octets)

    def _set_clock(self) -> None:
        if not self.bucket.used_up:
            self.deadline = trio.current_time() + self.bucket.wait
            self._timers.watch(self)


class Allowance:
    """What one direction of one relay may pass now."""

    __slots__ = ("_resume", "_throttle", "left", "waiting")

    def __init__(self, throttle: Throttle, resume: Callable[[], None]) -> None:
        """`resume` is called when there is some again."""
        self.left = 0
        self.waiting = False
        self._throttle = throttle
        self._resume = resume

    def get(self) -> int:
        """Octets that may pass now; 0: `resume` comes."""
        if not self.left and not self.waiting:
            self.left = self._throttle.take(self)
            self.waiting = not self.left
        return self.left

    def use(self, octets: int) -> None:
        """So many passed."""
        self.left -= octets

    def go(self, octets: int) -> None:
        """Our turn in the line."""
        self.waiting = False
        self.left += octets
        self._resume()

    def rest(self) -> None:
        """Nothing is there to pass: others may have what is left."""
        if self.left:
            self._throttle.bucket.give_back(self.left)
            self.left = 0

    def end(self) -> None:
        """The relay is over. Harmless when repeated."""
        self.rest()
        self._throttle.leave(self)
        self.waiting = True


class PatientThrottle:
    """The same for tasks, of which each has its place in the line by waiting."""

    def __init__(self, rate: float | None, quota: int | None, on_used_up: Callable[[], None]) -> None:
        """See `Throttle`."""
        self.bucket = Bucket(rate, quota, trio.current_time())
        self._on_used_up = on_used_up
        self._line = trio.StrictFIFOLock()

    @property
    def left(self) -> int | None:
        """Octets of the quota that are left; None: there is none."""
        return self.bucket.left

    async def pay(self, octets: int) -> int:
        """Wait until some of so many may pass, and return how many; for ever, where the quota is used up."""
        async with self._line:
            while not (paid := self.bucket.take(trio.current_time(), octets)):
                if self.bucket.used_up:
                    self._on_used_up()
                    await trio.sleep_forever()
                await trio.sleep(self.bucket.wait)
        return paid
