"""One forwarded channel of an SSH connection (RFC 4254, section 5): numbers, credit, and the state of both directions.

    created ──set_originator──► opening ──confirmed──► open both ways ──EOF each──► CLOSE each ──► removed
                                   │ refused, or no reply in time: the visitor is reset

The relay opens the channel, and the client connects to its local server before it confirms. Until then the channel has
no credit, so nothing is read from its visitor. A visitor does not wait longer than `dial_timeout`; a later confirmation
is answered with CLOSE.

SSH and TCP end a connection differently in one case. When the local server closes its socket, the client sends EOF and
CLOSE at once, while the visitor may still be sending. Everything that was received is delivered, then the end of file.
The channel is reset only if the visitor sends more, as a kernel would do for a closed socket.
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

from tunneld.backends.ssh.fast import MAX_PACKET_DATA
from tunneld.mux.channel import Channel

if TYPE_CHECKING:
    from tunneld.backends.ssh.carrier import SshCarrier


MIN_PACKET_DATA = 256
"""Bytes of data in one packet that a peer must accept. Real clients accept 32 KiB (RFC 4253, section 6.1); a packet per
byte would slow down every other connection.
"""
CREDIT_AFTER_CLOSE = 1 << 31
"""Bytes of credit after the peer's CLOSE, so that the visitor's next write reaches `SshCarrier.write`, which resets."""


class ForwardEvents(Protocol):
    """The `-R` that a channel belongs to."""

    @property
    def place(self) -> tuple[str, int]:
        """The address and port by which the client knows this forward."""

    def on_capacity(self, channel: Channel) -> None:
        """`channel` has ended, so there may be capacity for another."""


class SshChannel(SSHPacketHandler):
    """The protocol state of one forwarded channel. asyncssh and the fast path pass its packets to it."""

    number: int
    channel: Channel

    def __init__(self, carrier: SshCarrier, events: ForwardEvents) -> None:
        self.carrier = carrier
        self.events = events
        self.data_header = b""  # of a data packet: type and the peer's channel number; empty until confirmed
        self.credit = 0  # bytes that the peer accepts
        self.max_data = 0  # bytes of data that the peer accepts in one packet
        self.window = carrier.limits.initial_window  # bytes that the peer may send
        self.opening = self.closed = self.closed_by_peer = self.eof_received = self.finishing = False
        self.deadline = 0.0  # for the confirmation, in Trio's time

    def send_open(self, originator: tuple[str, int]) -> None:
        """Ask the client to open the channel, and watch the deadline for its reply."""
        self.opening = True
        (host, port), (source, source_port) = self.events.place, originator
        self.carrier.connection.send_packet(
            MSG_CHANNEL_OPEN,
            String("forwarded-tcpip"),
            UInt32(self.number),
            UInt32(self.window),
            UInt32(MAX_PACKET_DATA),
            String(host),
            UInt32(port),
            String(source),
            UInt32(source_port),
        )
        self.deadline = trio.current_time() + self.carrier.dial_timeout
        self.carrier.pump.timers.watch(self)

    def on_deadline(self) -> None:
        """The client did not reply in time; see `engine.timers.Timed`."""
        self.close()
        seconds = f"{self.carrier.dial_timeout:g} s"
        self.channel.notify_reset(f"the ssh client did not reach the local server in {seconds} (ssh.dial_timeout)")

    def send(self, kind: int, *args: bytes) -> None:
        """Send a packet of this channel. Nothing is sent before the confirmation or after CLOSE."""
        if self.data_header and not self.closed:
            self.carrier.connection.send_packet(kind, self.data_header[1:5], *args)

    def finish(self) -> None:
        """Send EOF, as soon as the channel is confirmed; after the peer's EOF also CLOSE."""
        self.finishing = True
        if self.data_header:
            if not self.closed_by_peer:
                self.send(MSG_CHANNEL_EOF)
            if self.eof_received:
                self.close()

    def close(self) -> None:
        """Send CLOSE, or, before the confirmation, leave that to `process_open_confirmation`."""
        self.release()
        if self.data_header:
            self.send(MSG_CHANNEL_CLOSE)
            self.closed = True
        if self.closed_by_peer or not self.opening:
            self._remove()

    def release(self) -> None:
        """The visitor's side has ended: give the window back and stop the timer."""
        self.carrier.pump.timers.forget(self)
        self.carrier.release(self)

    def _remove(self) -> None:
        """Both sides have ended: free the channel number."""
        self.carrier.pump.timers.forget(self)
        if self.carrier.connection._channels.pop(self.number, None) is not None:
            self.events.on_capacity(self.channel)

    def is_released(self) -> bool:
        """Whether the visitor's side has ended."""
        return self.carrier.channels.get(self.number) is not self

    def receive_data(self, packet: bytes, start: int, stop: int) -> None:
        """Pass data to the visitor: a string (its length, then its bytes) from `start` to `stop` of the packet."""
        size = int.from_bytes(packet[start : start + 4], "big")
        start += 4
        if start + size != stop:
            raise asyncssh.ProtocolError("data packet with a wrong length")
        if size > self.window or self.eof_received:
            raise asyncssh.ProtocolError("data after the end of file" if self.eof_received else "window exceeded")
        self.window -= size
        if size:
            with memoryview(packet) as view, view[start:stop] as data:
                self.channel.feed(data)

    # asyncssh's interface of a channel

    def log_received_packet(self, pkttype: int, pktid: int | None, packet: object, note: str = "") -> None:
        """Nothing: packets are not logged."""

    def process_packet(self, pkttype: int, pktid: int, packet: SSHPacket) -> bool:
        """Handle a packet of this channel; its channel number has been read."""
        handler = HANDLERS.get(pkttype)
        if handler is None:
            raise asyncssh.ProtocolError(f"unexpected packet type {pkttype} on a forwarded channel")
        handler(self, packet)
        return True

    def process_open_confirmation(self, number: int, window: int, max_data: int, _packet: SSHPacket) -> None:
        """The client has connected to the local server."""
        if self.data_header or not self.opening:
            raise asyncssh.ProtocolError("confirmation of a channel that is not being opened")
        self.carrier.pump.timers.forget(self)
        self.data_header = b"%c%b" % (MSG_CHANNEL_DATA, number.to_bytes(4, "big"))
        if max_data < MIN_PACKET_DATA:
            raise asyncssh.ProtocolError(f"a maximum packet size of {max_data} bytes is too small")
        self.credit, self.max_data = window, min(max_data, MAX_PACKET_DATA)
        if self.is_released():  # the visitor did not wait
            self.send(MSG_CHANNEL_CLOSE)
            self.closed = True
            return
        self.channel.notify_writable()
        if self.finishing and not self.is_released():
            self.finish()

    def process_open_failure(self, _code: int, reason: str, _lang: str) -> None:
        """The client could not connect to the local server, or refused the channel."""
        if self.data_header or not self.opening:
            raise asyncssh.ProtocolError("refusal of a channel that is not being opened")
        self._remove()
        if not self.is_released():
            self.release()
            self.channel.notify_reset(f"refused by the ssh client: {reason}")

    def process_connection_close(self, _error: Exception | None) -> None:
        """The connection was closed; `SshCarrier.on_lost` has reset the visitor."""
        self._remove()

    # Packet handlers

    def _process_data(self, packet: SSHPacket) -> None:
        if not self.is_released():
            payload = packet.get_full_payload()
            self.receive_data(payload, 5, len(payload))

    def _process_window_adjust(self, packet: SSHPacket) -> None:
        added = packet.get_uint32()
        if self.credit + added > 0xFFFFFFFF:
            raise asyncssh.ProtocolError("a window of more than 2^32 bytes")
        self.credit += added
        if not self.is_released():
            self.channel.notify_writable()

    def _process_request(self, packet: SSHPacket) -> None:
        packet.get_string()
        if packet.get_boolean():
            self.send(MSG_CHANNEL_FAILURE)

    def _process_eof(self, _packet: SSHPacket) -> None:
        if self.eof_received or self.is_released():
            return
        self.eof_received = True
        self.channel.feed_eof()
        if self.finishing and not self.is_released():
            self.close()

    def _process_close(self, _packet: SSHPacket) -> None:
        self.closed_by_peer = True
        if self.is_released():
            self._remove()
            return
        if not self.eof_received:
            self.release()
            self.channel.notify_reset("closed by the peer")
        self.send(MSG_CHANNEL_CLOSE)
        self.closed = True
        if self.is_released():
            self._remove()
        else:
            self.credit = CREDIT_AFTER_CLOSE


HANDLERS: dict[int, Callable[[SshChannel, SSHPacket], None]] = {
    MSG_CHANNEL_DATA: SshChannel._process_data,
    MSG_CHANNEL_WINDOW_ADJUST: SshChannel._process_window_adjust,
    MSG_CHANNEL_EOF: SshChannel._process_eof,
    MSG_CHANNEL_CLOSE: SshChannel._process_close,
    MSG_CHANNEL_REQUEST: SshChannel._process_request,
}
