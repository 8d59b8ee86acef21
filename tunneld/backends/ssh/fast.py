"""asyncssh's connection with a fast path for data.

Once a client has logged in and uses AES-GCM, `feed` decrypts packets where they lie in the pump's buffer, and
`send_data` encrypts a channel's bytes straight into the send buffer. Data packets go to the carrier. All other packets,
and every connection that has not logged in or is exchanging keys, take asyncssh's slow path.

The fast path leaves out what asyncssh does there at too high a price: an empty packet before each packet (a
countermeasure for CBC), a log line per packet, and a new cipher context per packet.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import asyncssh
from asyncssh.constants import (
    MSG_CHANNEL_DATA,
    MSG_CHANNEL_FIRST,
    MSG_CHANNEL_LAST,
    MSG_GLOBAL_REQUEST,
    MSG_IGNORE,
    MSG_KEX_FIRST,
    MSG_KEX_LAST,
    MSG_KEXINIT,
    MSG_REQUEST_FAILURE,
    MSG_REQUEST_SUCCESS,
    MSG_UNIMPLEMENTED,
)
from asyncssh.packet import PacketDecodeError, SSHPacket, SSHPacketHandler, UInt32
from cryptography.exceptions import InvalidTag

from tunneld.backends.ssh.gcm import TAG_BYTES, Gcm
from tunneld.backends.ssh.restricted import MIN_PADDING, RestrictedConnection

if TYPE_CHECKING:
    from tunneld.backends.ssh.transport import SshTransport

MAX_PACKET_DATA = 64 * 1024
"""Bytes of a channel's data that we accept in one packet: twice as many as OpenSSH's usual 32 KiB."""
PACKET_OVERHEAD = 1024
"""Bytes that a packet may have in addition to its data."""
MAX_PACKETS_PER_TURN = 256
"""Packets handled per turn of the pump, if the owner's share of the turn allows so many."""
PACKET_COST = 8
"""Units of cost (engine/budget.py) of a packet that is not data: asyncssh parses it, and most need a reply, which is
encrypted."""
SLOW_PATH_READ_BYTES = 8 * 1024
"""Read per turn of the pump on asyncssh's path, which takes ten times as long: 512 of the smallest packets."""
MAX_DEFERRED_PACKETS = 8192
"""Packets to send that wait for the end of a key exchange: openings and ends of all visitors that there may be."""
MAX_PENDING_INPUT = 64 * 1024
"""Bytes held while a key exchange or a signature is computed; then reading stops."""
CIPHER_BLOCK = 16
PADDING = os.urandom(2 * CIPHER_BLOCK)
"""Padding bytes. They need not be fresh under an authenticated cipher."""


class FastConnection(RestrictedConnection):
    """The protocol of one client's connection. The transport calls `feed`, the carrier the `send_` methods."""

    transport: SshTransport
    on_channel_data: Callable[[int, bytes, int, int], None]  # channel number, packet, start and end of the data in it
    on_keepalive_reply: Callable[[], None]
    on_new_keys: Callable[[], None]  # a key exchange is done, and channels may send

    def __init__(self, loop: asyncio.AbstractEventLoop, options: asyncssh.SSHServerConnectionOptions) -> None:
        super().__init__(loop, options)
        self.pending_keepalives = 0  # sent and not answered
        self.has_unparsed = False  # see `PacketReceiver`
        self._max_packet = MAX_PACKET_DATA + PACKET_OVERHEAD
        self._update_recv_pktlen(MAX_PACKET_DATA)

    # Fast path: receiving

    @property
    def on_fast_path(self) -> bool:
        """Whether received packets take the fast path now."""
        return type(self._recv_encryption) is Gcm and self._auth_complete and self._recv_handler == self._recv_pkthdr

    @property
    def is_busy(self) -> bool:
        """See `PacketReceiver.is_busy`."""
        return len(self._inpbuf) > MAX_PENDING_INPUT and self._recv_handler != self._recv_pkthdr

    @property
    def read_limit(self) -> int:
        """See `PacketReceiver.read_limit`."""
        return 0 if self.on_fast_path else SLOW_PATH_READ_BYTES

    @property
    def channel_count(self) -> int:
        """Channels of all kinds, including channels that the peer has not closed yet."""
        return len(self._channels)

    def take_partial_packet(self) -> bytes:
        """See `PacketReceiver.take_partial_packet`."""
        if not self.on_fast_path:
            return b""
        partial_packet, self._inpbuf = self._inpbuf, b""
        return partial_packet

    def feed(self, data: memoryview) -> None:
        """See `PacketReceiver.feed`."""
        size, seq, share = len(data), self._recv_seq, self.transport.turns.share
        try:
            self.has_unparsed = False
            while data and self.on_fast_path and not self.has_unparsed and (taken := self._receive_packets(data)):
                data = data[taken:]
            if data:
                self._inpbuf += bytes(data)
                if not self.on_fast_path:
                    self._recv_data()
                    share.use(
                        PACKET_COST * (self._recv_seq - (seq if seq <= self._recv_seq else 0))
                    )  # reset by new keys
            self._rekey_bytes_sent += size  # of both directions: a client that only sends may never start an exchange
            if self._rekey_bytes_sent >= self._rekey_bytes:
                self.exchange_keys()
        except asyncssh.DisconnectError as error:
            self._send_disconnect(error.code, error.reason, error.lang)
            self._force_close(error if isinstance(error, Exception) else None)
        except Exception:
            self.internal_error()

    def _receive_packets(self, data: memoryview) -> int:
        """Decrypt and handle complete packets, at most `MAX_PACKETS_PER_TURN`, and as many as the owner's share of this
        turn allows. Returns the bytes that they took.
        """
        cipher = self._recv_encryption
        assert isinstance(cipher, Gcm)
        at, end, max_packet, on_channel_data = 0, len(data), self._max_packet, self.on_channel_data
        share = self.transport.turns.share
        for _ in range(MAX_PACKETS_PER_TURN):
            if end - at < CIPHER_BLOCK:
                return at
            size = int.from_bytes(data[at : at + 4], "big")
            if size > max_packet or size % CIPHER_BLOCK or not size:
                raise asyncssh.ProtocolError(f"a packet of {size} bytes is too large or does not fill blocks")
            after = at + 4 + size + TAG_BYTES
            if after > end:
                return at
            if share.left <= 0:
                break
            try:
                packet = cipher.open(data[at : at + 4], data[at + 4 : after])
            except InvalidTag:
                raise asyncssh.MACError("MAC verification failed") from None
            at = after
            stop = size - packet[0]
            if stop < 2 or packet[0] < MIN_PADDING:
                raise asyncssh.ProtocolError(f"{packet[0]} bytes of padding in a packet of {size}")
            if packet[1] == MSG_CHANNEL_DATA and stop >= 10:
                share.use(1)
                self._recv_seq = (self._recv_seq + 1) & 0xFFFFFFFF
                on_channel_data(int.from_bytes(packet[2:6], "big"), packet, 6, stop)
                if self._transport is None:
                    return end
            else:
                share.use(PACKET_COST)
                self._dispatch(packet[1:stop])
                if not self.on_fast_path or self._recv_encryption is not cipher or self._transport is None:
                    return at
        self.has_unparsed = True
        return at

    def _dispatch(self, payload: bytes) -> None:
        """Handle a packet that is not data, as asyncssh's dispatch does after the login."""
        packet, seq = SSHPacket(payload), self._recv_seq
        kind = packet.get_byte()
        handler: SSHPacketHandler = self
        try:
            if MSG_KEX_FIRST <= kind <= MSG_KEX_LAST:
                if self._kex is None:
                    raise asyncssh.ProtocolError("key exchange not in progress")
                handler = self._kex
            elif MSG_CHANNEL_FIRST <= kind <= MSG_CHANNEL_LAST:
                number = packet.get_uint32()
                channel = self._channels.get(number)
                if channel is None:
                    raise asyncssh.ProtocolError(f"invalid channel number {number}")
                handler = channel
            result = handler.process_packet(kind, seq, packet)
        except PacketDecodeError as error:
            raise asyncssh.ProtocolError(str(error)) from None
        if inspect.isawaitable(result):
            self._recv_handler = lambda: False  # later packets wait, see asyncssh's _recv_packet
            task = self.create_task(result)
            task.add_done_callback(partial(self._finish_recv_packet, kind, seq, is_async=True))
            return
        if not result:
            self.send_packet(MSG_UNIMPLEMENTED, UInt32(seq))
        self._finish_recv_packet(kind, seq)

    def _recv_pkthdr(self) -> bool:
        """The receive loop of asyncssh calls this before each packet: use the fast path for its buffer if possible."""
        if not self.on_fast_path:
            return super()._recv_pkthdr()
        data, self._inpbuf = self._inpbuf, b""
        taken = self._receive_packets(memoryview(data))
        self._inpbuf = data[taken:] + self._inpbuf
        if self.has_unparsed:
            self.transport.reschedule()
            return False
        return taken > 0

    def _finish_recv_packet(
        self, pkttype: int, seq: int, _task: asyncio.Task[None] | None = None, is_async: bool = False
    ) -> None:
        super()._finish_recv_packet(pkttype, seq, _task, is_async)
        if is_async:
            self.transport.resume_reading()

    # Fast path: sending

    @property
    def can_send(self) -> bool:
        """Whether channels may send: not during a key exchange, which this starts when it is due."""
        if self._kex_complete and (self._rekey_bytes_sent >= self._rekey_bytes or time.monotonic() >= self._rekey_time):
            self.exchange_keys()
        return self._kex_complete

    def exchange_keys(self) -> None:
        """Start a key exchange, unless one is in progress."""
        if self._kex_complete and self._auth_complete and self._transport is not None:
            self._send_kexinit()
            self._kexinit_sent = True

    def send_data(self, header: bytes, data: memoryview) -> None:
        """Send a channel's data; `header` is the packet type and the peer's channel number."""
        size = len(data)
        self._send_payload(b"".join((header, size.to_bytes(4, "big"), data)))

    def send_packet(self, pkttype: int, *args: bytes, handler: object = None) -> None:
        """Send any packet; asyncssh calls this, too. SSH_MSG_IGNORE is not sent."""
        if pkttype == MSG_IGNORE:
            return
        if self._auth_complete and self._kex_complete and type(self._send_encryption) is Gcm:
            self._send_payload(b"%c%b" % (pkttype, b"".join(args)))
        elif len(self._deferred_packets) >= MAX_DEFERRED_PACKETS:
            self._force_close(asyncssh.ProtocolError("a key exchange was started and not completed"))
        else:
            super().send_packet(pkttype, *args, handler=handler)  # type: ignore[arg-type]

    def _send_payload(self, payload: bytes) -> None:
        cipher = self._send_encryption
        if type(cipher) is not Gcm:
            super().send_packet(payload[0], payload[1:])
            return
        padding = 4 + (11 - len(payload)) % CIPHER_BLOCK
        packet = b"%c%b%b" % (padding, payload, PADDING[:padding])
        size = len(packet)
        length = size.to_bytes(4, "big")
        transport = self.transport
        outgoing = transport.outgoing
        outgoing += length
        outgoing += cipher.seal(length, packet)
        transport.outbox.schedule_flush()
        self._send_seq = (self._send_seq + 1) & 0xFFFFFFFF
        self._rekey_bytes_sent += size

    def send_newkeys(self, k: bytes, h: bytes) -> None:
        """A key exchange is complete: channels may send."""
        super().send_newkeys(k, h)
        if self._auth_complete:
            self.on_new_keys()

    # Keepalives

    def send_keepalive(self) -> None:
        """Send a request that the client must answer; `on_keepalive_reply` is called then."""
        self.pending_keepalives += 1
        self._send_global_request(b"keepalive@openssh.com", want_reply=True)

    def _process_keepalive_reply(self, _pkttype: int, _pktid: int, _packet: SSHPacket) -> None:
        if not self.pending_keepalives:
            raise asyncssh.ProtocolError("unexpected reply to a global request")
        self.pending_keepalives -= 1
        self.on_keepalive_reply()

    def _reset_keepalive_timer(self) -> None:
        """Nothing: asyncssh would do this for every packet. See `SshCarrier.heartbeat`."""

    _packet_handlers = {  # noqa: RUF012  # asyncssh's table, with our handlers in it
        **asyncssh.SSHServerConnection._packet_handlers,
        MSG_KEXINIT: RestrictedConnection._process_kexinit,
        MSG_GLOBAL_REQUEST: RestrictedConnection._process_global_request,
        MSG_REQUEST_SUCCESS: _process_keepalive_reply,
        MSG_REQUEST_FAILURE: _process_keepalive_reply,
    }
