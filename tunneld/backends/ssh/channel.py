"""One channel as an SSH connection knows it (RFC 4254, section 5): numbers, credit, and who has said what of its end.

    open ──introduce──► asked ──confirmed──► open both ways ──EOF each──► CLOSE each ──► gone
                          │ refused, or no answer in time: the visitor is reset

A channel is opened towards the client, which connects to its server and answers; until then it has no credit, so its
visitor is not read. A visitor does not wait for ever for that; whatever answer comes later, ends the channel. What the
two protocols call the ends differs in one thing: a client that closes its socket whole says EOF and CLOSE at once,
while our visitor may still be speaking. Then what it said is delivered and ended as EOF asks; only where the visitor
says more is the channel broken, as a kernel would have it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import asyncssh
import trio
from asyncssh.constants import (
    MSG_CHANNEL_CLOSE,
    MSG_CHANNEL_DATA,
    MSG_CHANNEL_EOF,
    MSG_CHANNEL_FAILURE,
    MSG_CHANNEL_OPEN,
    MSG_CHANNEL_REQUEST,
    MSG_CHANNEL_WINDOW_ADJUST,
)
from asyncssh.packet import SSHPacket, SSHPacketHandler, String, UInt32

from tunneld.backends.ssh.fast import MAX_PACKET
from tunneld.mux.channel import Channel

if TYPE_CHECKING:
    from tunneld.backends.ssh.carrier import SshCarrier


LEAST_PACKET = 256
"""Octets that a packet of data must be able to have: everybody takes 32 KiB (RFC 4253, section 6.1), and a packet for
each octet would keep everybody else waiting.
"""


class ForwardEvents(Protocol):
    """Whose visitors a channel carries: one `-R`."""

    @property
    def place(self) -> tuple[str, int]:
        """What the client asked to listen on, by which it knows what is meant."""

    def on_capacity(self, channel: Channel) -> None:
        """A channel ended."""


class SshChannel(SSHPacketHandler):
    """One channel as the connection knows it: numbers, credit, and who has said what of its end."""

    number: int
    channel: Channel

    def __init__(self, carrier: SshCarrier, owner: ForwardEvents) -> None:
        self.carrier = carrier
        self.owner = owner
        self.head = b""  # of a packet of data; empty until the peer has confirmed
        self.credit = 0
        self.most = 0  # octets of data in one packet
        self.allowed = carrier.limits.first_window
        self.asked = self.closed = self.closed_by_peer = self.ended = self.finishing = False
        self.deadline = 0.0  # for the answer, in Trio's time

    def ask(self, originator: tuple[str, int]) -> None:
        """Open it."""
        self.asked = True
        (host, port), (source, source_port) = self.owner.place, originator
        self.carrier.connection.send_packet(
            MSG_CHANNEL_OPEN,
            String("forwarded-tcpip"),
            UInt32(self.number),
            UInt32(self.allowed),
            UInt32(MAX_PACKET),
            String(host),
            UInt32(port),
            String(source),
            UInt32(source_port),
        )
        self.deadline = trio.current_time() + self.carrier.dial_timeout
        self.carrier.pump.timers.watch(self)

    def on_deadline(self) -> None:
        """It was not answered in time; see `relay.timers.Timed`."""
        self.close()
        self.channel.notify_reset(f"its ssh did not connect in {self.carrier.dial_timeout:g} s (ssh.dial_timeout)")

    def say(self, kind: int, *args: bytes) -> None:
        """A packet on this channel, if the peer has it and we have not closed it."""
        if self.head and not self.closed:
            self.carrier.connection.send_packet(kind, self.head[1:5], *args)

    def finish(self) -> None:
        """We send no more."""
        self.finishing = True
        if self.head:
            if not self.closed_by_peer:
                self.say(MSG_CHANNEL_EOF)
            if self.ended:
                self.close()

    def close(self) -> None:
        """Say the last word, as soon as it can be said."""
        self.forget()
        if self.head:
            self.say(MSG_CHANNEL_CLOSE)
            self.closed = True
        if self.closed_by_peer or not self.asked:
            self._drop()

    def forget(self) -> None:
        """It is over for its user."""
        self.carrier.pump.timers.forget(self)
        self.carrier.forget(self)

    def _drop(self) -> None:
        """It is over for both: its place is another's."""
        self.carrier.pump.timers.forget(self)
        if self.carrier.connection._channels.pop(self.number, None) is not None:
            self.owner.on_capacity(self.channel)

    def is_over(self) -> bool:
        """For its user."""
        return self.carrier.flows.get(self.number) is not self

    def hear_data(self, packet: bytes, start: int, stop: int) -> None:
        """Octets for the visitor: a string (its length, then itself) from `start` to `stop`."""
        size = int.from_bytes(packet[start : start + 4], "big")
        start += 4
        if start + size != stop:
            raise asyncssh.ProtocolError("Incomplete data packet received")
        if size > self.allowed or self.ended:
            raise asyncssh.ProtocolError("Data beyond the end of its channel" if self.ended else "Window exceeded")
        self.allowed -= size
        if size:
            with memoryview(packet) as view, view[start:stop] as data:
                self.channel.feed(data)

    # What asyncssh asks of a channel

    def log_received_packet(self, pkttype: int, pktid: int | None, packet: object, note: str = "") -> None:
        """Not at all."""

    def process_packet(self, pkttype: int, pktid: int, packet: SSHPacket) -> bool:
        """A packet for this channel, behind its number."""
        obey = HANDLERS.get(pkttype)
        if obey is None:
            raise asyncssh.ProtocolError(f"Unexpected packet {pkttype} on a forwarded channel")
        obey(self, packet)
        return True

    def process_open_confirmation(self, number: int, window: int, most: int, _packet: SSHPacket) -> None:
        """The client has connected to the hidden server."""
        if self.head or not self.asked:
            raise asyncssh.ProtocolError("Channel not being opened")
        self.carrier.pump.timers.forget(self)
        self.head = b"%c%b" % (MSG_CHANNEL_DATA, number.to_bytes(4, "big"))
        if most < LEAST_PACKET:
            raise asyncssh.ProtocolError(f"Packets of {most} octets are too small")
        self.credit, self.most = window, min(most, MAX_PACKET)
        if self.is_over():  # the visitor did not wait
            self.say(MSG_CHANNEL_CLOSE)
            self.closed = True
            return
        self.channel.notify_writable()
        if self.finishing and not self.is_over():
            self.finish()

    def process_open_failure(self, _code: int, reason: str, _lang: str) -> None:
        """The client could not connect to the hidden server, or does not want to."""
        if self.head or not self.asked:
            raise asyncssh.ProtocolError("Channel not being opened")
        self._drop()
        if not self.is_over():
            self.forget()
            self.channel.notify_reset(f"refused at the other end: {reason}")

    def process_connection_close(self, _error: Exception | None) -> None:
        """Asyncssh cleans up; `SshCarrier.lose` has told the user."""
        self._drop()

    # Inside

    def _process_data(self, packet: SSHPacket) -> None:
        if not self.is_over():
            payload = packet.get_full_payload()
            self.hear_data(payload, 5, len(payload))

    def _process_credit(self, packet: SSHPacket) -> None:
        octets = packet.get_uint32()
        if self.credit + octets > 0xFFFFFFFF:
            raise asyncssh.ProtocolError("A window of more than 2^32 octets")
        self.credit += octets
        if not self.is_over():
            self.channel.notify_writable()

    def _process_request(self, packet: SSHPacket) -> None:
        packet.get_string()
        if packet.get_boolean():
            self.say(MSG_CHANNEL_FAILURE)

    def _process_end(self, _packet: SSHPacket) -> None:
        if self.ended or self.is_over():
            return
        self.ended = True
        self.channel.feed_eof()
        if self.finishing and not self.is_over():
            self.close()

    def _process_close(self, _packet: SSHPacket) -> None:
        self.closed_by_peer = True
        if self.is_over():
            self._drop()
            return
        if not self.ended:
            self.forget()
            self.channel.notify_reset("closed by the peer")
        self.say(MSG_CHANNEL_CLOSE)
        self.closed = True
        if self.is_over():
            self._drop()
        else:
            self.credit = 1 << 31  # what the visitor says now breaks the channel, see `SshCarrier.put`


HANDLERS: dict[int, Callable[[SshChannel, SSHPacket], None]] = {
    MSG_CHANNEL_DATA: SshChannel._process_data,
    MSG_CHANNEL_WINDOW_ADJUST: SshChannel._process_credit,
    MSG_CHANNEL_EOF: SshChannel._process_end,
    MSG_CHANNEL_CLOSE: SshChannel._process_close,
    MSG_CHANNEL_REQUEST: SshChannel._process_request,
}
