"""The channels of one carrier that are not over, whatever protocol it speaks."""

from __future__ import annotations

from collections.abc import Callable

from tunneld.mux.channel import Channel
from tunneld.mux.turns import CarrierTurns


class ChannelTable:
    """The channels of a carrier, by id. It tells them what their peer did, and forgets those that are over."""

    __slots__ = ("_on_removed", "_parity", "_turns", "channels", "opened")

    def __init__(self, turns: CarrierTurns, parity: int, on_removed: Callable[[Channel], None]) -> None:
        """`parity` is that of the ids that we open. `on_removed` is called with a channel that was removed."""
        self.channels: dict[int, Channel] = {}
        self.opened = 0  # channels that we opened
        self._turns = turns
        self._parity = parity
        self._on_removed = on_removed

    def add(self, channel: Channel) -> None:
        """A channel begins."""
        self.channels[channel.sid] = channel
        if channel.sid & 1 == self._parity:
            self.opened += 1

    def remove(self, channel: Channel) -> None:
        """Both directions are over for the codec; the channel's buffered bytes can still be consumed. Does nothing if
        it was removed before.
        """
        if self.channels.get(channel.sid) is not channel:
            return
        del self.channels[channel.sid]
        self._turns.forget(channel)
        channel.release_window()
        if channel.sid & 1 == self._parity:
            self.opened -= 1
        self._on_removed(channel)

    def on_credit(self, sid: int) -> None:
        """The peer granted credit."""
        channel = self.channels.get(sid)
        if channel is not None and not self._turns.waits(channel):
            channel.notify_writable()

    def on_eof(self, sid: int) -> None:
        """The peer ended its direction."""
        channel = self.channels.get(sid)
        if channel is not None:
            if channel.eof_sent:
                self.remove(channel)  # first: the codec has forgotten it, whatever the handler does
            channel.feed_eof()

    def on_reset(self, sid: int, reason: str) -> None:
        """The peer ended both directions."""
        channel = self.channels.get(sid)
        if channel is not None:
            self.remove(channel)
            channel.notify_reset(reason or "closed by the peer")

    def close(self, reason: str) -> None:
        """The carrier is over, and so is every channel."""
        channels = list(self.channels.values())
        self.channels.clear()
        for channel in channels:
            channel.notify_reset(f"multiplexed connection lost: {reason}")
