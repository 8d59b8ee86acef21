"""Whom a carrier tells."""

from __future__ import annotations

from typing import Protocol

from tunneld.session.channel import Channel


class Owner(Protocol):
    """Called in the pump's task; an exception costs the carrier."""

    def opened(self, channel: Channel, protocol: int) -> None:
        """The peer opened a channel: `accept` or `reset` it before this returns."""

    def defined(self, uri: str | None) -> None:
        """The peer can be called back as this URI; None: it named something that is none."""

    def freed(self) -> None:
        """A channel ended, so `can_open` may be true again."""

    def answered(self) -> None:
        """The peer gave a sign of life, and so has read everything that we said before we asked for it."""

    def silent(self) -> None:
        """The peer does not answer: perhaps it is about to be lost."""

    def ended(self, reason: str) -> None:
        """The carrier is gone, and so are its channels."""
