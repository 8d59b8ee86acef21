"""Whom a carrier tells."""

from __future__ import annotations

from typing import Protocol

from tunneld.session.channel import Channel


class CarrierEvents(Protocol):
    """Called in the pump's task; an exception costs the carrier."""

    def on_opened(self, channel: Channel, protocol: int) -> None:
        """The peer opened a channel: `accept` or `reset` it before this returns."""

    def on_endpoint(self, uri: str | None) -> None:
        """The peer can be called back as this URI; None: it named something that is none."""

    def on_capacity(self) -> None:
        """A channel ended, so `can_open` may be true again."""

    def on_pong(self) -> None:
        """The peer gave a sign of life, and so has read everything that we said before we asked for it."""

    def on_unresponsive(self) -> None:
        """The peer does not answer: perhaps it is about to be lost."""

    def on_closed(self, reason: str) -> None:
        """The carrier is gone, and so are its channels."""
