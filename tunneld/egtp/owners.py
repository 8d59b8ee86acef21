"""What links and associations call: the interfaces of their owners.

Link ──LinkOwner──► Attachment ──FrameOwner──► EgtpCarrier ──► channels
                        └────────AssociationEvents───┴──► the server side at the relay, the source at the agent
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from tunneld.mux.channel import Channel
from tunneld.wire.egtp.messages import MojoRequest
from tunneld.wire.mencode import Value

if TYPE_CHECKING:
    from tunneld.egtp.link import Link


class LinkOwner(Protocol):
    """What a link calls. An exception ends the link."""

    @property
    def must_wait(self) -> bool:
        """Whether nothing more is to be read in this turn: the owner calls `Link.read` in a later one."""

    def use(self, cost: int) -> None:
        """Something was done that costs this much of the owner's share of a turn."""

    def on_streams(self, number: int, frames: memoryview) -> bool:
        """A message of streams came. Returns whether it is to be acknowledged."""

    def on_acknowledged(self, number: int) -> None:
        """The peer has this message and all before it."""

    def on_request(self, request: MojoRequest) -> Value:
        """Another request came; the result is the body of the response. Raises `RemoteProtocolError`."""

    def on_mail(self, body: Value) -> None:
        """The response to `Link.ask` came, with this body. Raises `RemoteProtocolError`."""

    def on_writable(self) -> None:
        """The connection accepts output again."""

    def on_input(self) -> None:
        """Bytes came."""

    def on_lost(self, link: Link, reason: str) -> None:
        """The link has ended."""

    def on_stop(self) -> None:
        """The pump stops."""


class FrameOwner(Protocol):
    """What an attachment calls for the frames in messages: the carrier. An exception ends the link."""

    @property
    def must_wait(self) -> bool:
        """See `LinkOwner.must_wait`."""

    def use(self, cost: int) -> None:
        """See `LinkOwner.use`."""

    @property
    def outgoing(self) -> bytearray:
        """The frames that are to be sent."""

    def receive(self, messages: list[bytes | memoryview]) -> None:
        """Take the frames of messages, in order."""

    def on_reachable(self) -> None:
        """There is a link again, or the peer has polled."""

    def on_room(self) -> None:
        """Output that found no room may find some now."""

    def end(self, reason: str) -> None:
        """The association is over."""


class AssociationEvents(Protocol):
    """What an association calls, in the pump's task."""

    def on_opened(self, channel: Channel, label: bytes) -> None:
        """The peer opened a channel: set its handler or `reset` it before this returns."""

    def on_capacity(self) -> None:
        """A channel ended, or the peer can be reached again, so `open` may succeed."""

    def on_retired(self) -> None:
        """The peer wants no more channels."""

    def on_settled(self) -> None:
        """The peer has acknowledged everything that was sent."""

    def on_unresponsive(self) -> None:
        """The peer does not answer; the link may be about to be lost."""

    def on_detached(self, reason: str) -> None:
        """The link is lost; the channels wait for another one."""

    def on_output(self) -> None:
        """There is something to send, and no link. Called once, until there is another link."""

    def on_polled(self, count: int) -> None:
        """The peer has answered our poll, with this many messages."""

    def on_closed(self, reason: str) -> None:
        """The association is over, and so are its channels."""
