"""Which parts of a carrier wait for the next turn of the pump, because its owner has used up its share of this one."""

from __future__ import annotations

from collections.abc import Callable

from tunneld.engine.budget import CostShare, TurnBudget
from tunneld.engine.end import BufferedEnd
from tunneld.engine.engine import FailureCallback


class CarrierTurns:
    """The channels of one carrier that may not write yet, and whether its input waits. A `DeferredHandler`."""

    __slots__ = ("_budget", "_deferred", "_on_failure", "_read", "_unread", "_unserved", "share")

    def __init__(self, budget: TurnBudget, read: Callable[[], None], on_failure: FailureCallback) -> None:
        """`read` is called to go on with the input, `on_failure` with a bug."""
        self.share = CostShare(budget)  # the owner of several carriers gives them the same
        self._budget = budget
        self._read = read
        self._on_failure = on_failure
        self._unserved: dict[BufferedEnd, None] = {}  # an ordered set
        self._unread = False
        self._deferred = False  # `on_turn` comes

    def read_later(self) -> None:
        """Call `read` in the next turn."""
        self._unread = True
        self._defer()

    def serve_later(self, channel: BufferedEnd) -> None:
        """Call the channel's `notify_writable` in a later turn."""
        self._unserved[channel] = None
        self._defer()

    def waits(self, channel: BufferedEnd) -> bool:
        """Whether the channel is served in a later turn."""
        return channel in self._unserved

    def forget(self, channel: BufferedEnd) -> None:
        """The channel is over."""
        self._unserved.pop(channel, None)

    def close(self) -> None:
        """The carrier is over."""
        self._unserved.clear()
        self._unread = False

    def on_turn(self) -> None:
        """See `DeferredHandler`. Channels get at most half of the share, reading the rest."""
        self._deferred = False
        channels = list(self._unserved)
        for channel in channels[: max(1, self.share.left // 2)]:
            if channel in self._unserved:  # one that was served before may have closed the carrier
                del self._unserved[channel]
                self.share.use(1)
                channel.notify_writable()
        if self._unread:
            self._unread = False
            self._read()
        if self._unserved:
            self._defer()

    def on_failure(self, error: Exception) -> None:
        """See `DeferredHandler`."""
        self._on_failure(error)

    def _defer(self) -> None:
        if not self._deferred:
            self._deferred = True
            self._budget.defer(self.share, self)
