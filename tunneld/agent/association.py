"""The agent's side of one association with a relay's EGTP node."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import trio

from tunneld.agent.end_visitor import EndVisitor
from tunneld.agent.network import is_local_address
from tunneld.egtp.carrier import EgtpCarrier
from tunneld.egtp.handshake import NodeConnection
from tunneld.egtp.limits import MAX_MAIL_VALUES, MISSED_POLLS, AssociationLimits
from tunneld.egtp.link import Link
from tunneld.engine.pump import Pump
from tunneld.mux.channel import Channel
from tunneld.mux.limits import CarrierLimits
from tunneld.wire.egtp.attaching import AttachRequest
from tunneld.wire.egtp.envelope import ID_SIZE

if TYPE_CHECKING:
    from tunneld.agent.associations import Associations

RESUME_TIMEOUT = 60.0
"""Seconds without a connection after which visitors are cut. The relay decides how long they wait, and says so when it
is asked.
"""
MAX_CHANNELS = 1_000_000
"""The relay decides how many visitors there are."""


class AgentAssociation:
    """One association, at the agent. Implements `AssociationEvents`."""

    def __init__(self, owner: Associations, engine: Pump, limits: CarrierLimits, poll: int) -> None:
        """`poll` is the interval between polls in seconds; 0: a connection is held."""
        self.id = os.urandom(ID_SIZE)
        self.retired = False  # takes no new visitors, and ends with the last one
        self.confirmed = False  # the relay knows that
        self.known = False  # the relay knows the association
        self._poll = poll
        times = AssociationLimits(resume_timeout=RESUME_TIMEOUT + MISSED_POLLS * poll, max_channels=MAX_CHANNELS)
        self.carrier = EgtpCarrier(engine, self, initiator=True, limits=limits, times=times)
        self._owner = owner
        self._address: tuple[str, int] | tuple[str, int, int, int] = ("", 0)
        self._polled = trio.Event()  # the relay has answered, or the link is lost
        self._fetched = 0  # messages in its answer

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return self.carrier.over

    @property
    def is_served(self) -> bool:
        """Whether the relay has visitors for it sent here, now or with the next poll."""
        return self.carrier.attachment.attached or (self.known and self._poll > 0)

    def request(self) -> AttachRequest:
        """What to ask the relay for on a new connection."""
        received = self.carrier.attachment.inbox.next
        return AttachRequest(self.id, self.known, received, not self._poll, self._poll)

    def attach(self, node: NodeConnection, received: int) -> None:
        """Go on with another link. Raises OSError if the connection is closed already."""
        carrier = self.carrier
        self.known = True
        self._address = node.connection.getsockname()
        link = Link(carrier.pump, node.connection, node.session, node.frames, carrier.limits, MAX_MAIL_VALUES)
        carrier.attachment.attach(link, received)

    async def poll(self) -> int:
        """Ask the relay for messages on the present link; returns how many there were."""
        attachment = self.carrier.attachment
        self._polled, self._fetched = trio.Event(), 0
        attachment.ask(self.id)
        if attachment.attached:
            await self._polled.wait()
        return self._fetched

    def probe(self) -> None:
        """Drop the link if this machine lost its address, else ping the relay."""
        attachment = self.carrier.attachment
        if attachment.attached and not is_local_address(self._address):
            attachment.hang_up("this machine's address changed")
        else:
            attachment.heartbeat.ping_now()

    def retire(self) -> None:
        """Ask the relay for no more visitors. Visitors that it sent before arrive before its acknowledgement."""
        if not self.retired:
            self.retired = True
            self.carrier.retire()

    # Called by the association

    def on_opened(self, channel: Channel, _label: bytes) -> None:
        """The relay opened a channel for a visitor; its PROXY header comes first."""
        channel.handler = EndVisitor(channel, self._owner.visitor_sink)

    def on_capacity(self) -> None:
        """A visitor left. Before a retired association ends, the relay must have everything of the last one."""
        if self.retired and not self.carrier.channels:
            self.carrier.attachment.send_ping()

    def on_retired(self) -> None:
        """Ignore this: an agent opens no channels."""

    def on_settled(self) -> None:
        """The relay has everything that was sent."""
        if self.retired:
            self.confirmed = True
            self._owner.notify_changed()
            if not self.carrier.channels:
                self.carrier.close("the agent has no more visitors")

    def on_unresponsive(self) -> None:
        """Nothing: the heartbeat gives the link up if this lasts."""

    def on_detached(self, _reason: str) -> None:
        """The link is lost."""
        self._polled.set()
        self._owner.on_detached()

    def on_output(self) -> None:
        """There is something to send."""
        self._owner.wake()

    def on_polled(self, count: int) -> None:
        """The relay has answered."""
        self._fetched = count
        self._polled.set()

    def on_closed(self, reason: str) -> None:
        """The association is over."""
        self._polled.set()
        self._owner.on_closed(self, reason)
