"""asyncssh's connection, on the short path.

Once a peer is known and speaks AES-GCM, `hear` opens packets where they lie in the pump's buffer, and `say_data` seals
a channel's octets straight into the outgoing ones. Data goes to the carrier; everything else, and every connection that
is not there yet or is exchanging keys, goes asyncssh's way. What asyncssh does there that costs more than it is worth
to us is left out: an empty packet before each (a remedy for CBC), a log line and a new cipher context each.
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

from tunneld.backends.ssh.gcm import TAG, Gcm
from tunneld.backends.ssh.restricted import RestrictedConnection

if TYPE_CHECKING:
    from tunneld.backends.ssh.transport import SshTransport

MAX_PACKET = 64 * 1024
"""Octets of a channel's data in one packet that we take: half the packets of OpenSSH's usual 32 KiB, where it obeys."""
OVERHEAD = 1024
"""Octets that a packet may have beyond its data."""
MAX_PACKETS_PER_TURN = 256
"""Packets heard before others have their turn: with the dearest, that are answered, it takes some milliseconds."""
SLOW_PATH_READ = 8 * 1024
"""Octets read before others have their turn where packets go asyncssh's way, which takes ten times as long: 512 of the
smallest.
"""
MAX_DEFERRED_PACKETS = 8192
"""Packets of ours that wait for the end of a key exchange: the openings and ends of all visitors that there may be."""
MAX_PENDING_INPUT = 64 * 1024
"""Octets that arrive while a key exchange or a proof is computed; then no more is read."""
BLOCK = 16
NOISE = os.urandom(2 * BLOCK)
"""Padding; under an authenticated cipher nothing depends on it."""


class FastConnection(RestrictedConnection):
    """One client's connection."""

    transport: SshTransport
    on_channel_data: Callable[
        [int, bytes, int, int], None
    ]  # a channel, a packet of ours, and where in it its data lies
    on_keepalive_reply: Callable[[], None]  # a keepalive was answered
    on_new_keys: Callable[[], None]  # new keys are in use: channels may speak

    def __init__(self, loop: asyncio.AbstractEventLoop, options: asyncssh.SSHServerConnectionOptions) -> None:
        super().__init__(loop, options)
        self.asked = 0  # keepalives that wait for an answer
        self.has_unparsed = False  # see `Hearer`
        self._max_packet = MAX_PACKET + OVERHEAD
        self._update_recv_pktlen(MAX_PACKET)

    # The short path: what arrives

    @property
    def on_fast_path(self) -> bool:
        """Whether packets arrive by the short path."""
        return type(self._recv_encryption) is Gcm and self._auth_complete and self._recv_handler == self._recv_pkthdr

    @property
    def is_busy(self) -> bool:
        """See `Hearer`."""
        return len(self._inpbuf) > MAX_PENDING_INPUT and self._recv_handler != self._recv_pkthdr

    @property
    def read_limit(self) -> int:
        """See `Hearer`."""
        return 0 if self.on_fast_path else SLOW_PATH_READ

    @property
    def channel_count(self) -> int:
        """Of all kinds, also those of which the peer has not said that they are closed."""
        return len(self._channels)

    def take_partial_packet(self) -> bytes:
        """See `Hearer`."""
        if not self.on_fast_path:
            return b""
        rest, self._inpbuf = self._inpbuf, b""
        return rest

    def feed(self, data: memoryview) -> None:
        """See `Hearer`."""
        octets = len(data)
        try:
            self.has_unparsed = False
            while data and self.on_fast_path and not self.has_unparsed and (taken := self._hear_packets(data)):
                data = data[taken:]
            if data:
                self._inpbuf += bytes(data)
                if not self.on_fast_path:
                    self._recv_data()
            self._rekey_bytes_sent += octets  # both ways: who only sends to us may not think of it
            if self._rekey_bytes_sent >= self._rekey_bytes:
                self.exchange_keys()
        except asyncssh.DisconnectError as error:
            self._send_disconnect(error.code, error.reason, error.lang)
            self._force_close(error if isinstance(error, Exception) else None)

    def _hear_packets(self, data: memoryview) -> int:
        """Open and obey packets, as many as are whole, and no more than are to be at once; returns the octets that they
        took.
        """
        cipher = self._recv_encryption
        assert isinstance(cipher, Gcm)
        at, end, most, hear_data = 0, len(data), self._max_packet, self.on_channel_data
        for _ in range(MAX_PACKETS_PER_TURN):
            if end - at < BLOCK:
                return at
            size = int.from_bytes(data[at : at + 4], "big")
            if size > most:
                raise asyncssh.ProtocolError(f"a packet of {size} octets is too large")
            after = at + 4 + size + TAG
            if after > end:
                return at
            try:
                packet = cipher.open(data[at : at + 4], data[at + 4 : after])
            except InvalidTag:
                raise asyncssh.MACError("MAC verification failed") from None
            at = after
            stop = size - packet[0]
            if stop < 2:
                raise asyncssh.ProtocolError("a packet is all padding")
            if packet[1] == MSG_CHANNEL_DATA and stop >= 10:
                self._recv_seq = (self._recv_seq + 1) & 0xFFFFFFFF
                hear_data(int.from_bytes(packet[2:6], "big"), packet, 6, stop)
                if self._transport is None:
                    return end
            else:
                self._obey(packet[1:stop])
                if not self.on_fast_path or self._recv_encryption is not cipher or self._transport is None:
                    return at
        self.has_unparsed = True
        return at

    def _obey(self, payload: bytes) -> None:
        """What is not data: asyncssh's dispatch for a peer that is known."""
        packet, seq = SSHPacket(payload), self._recv_seq
        kind = packet.get_byte()
        handler: SSHPacketHandler = self
        try:
            if MSG_KEX_FIRST <= kind <= MSG_KEX_LAST:
                if self._kex is None:
                    raise asyncssh.ProtocolError("Key exchange not in progress")
                handler = self._kex
            elif MSG_CHANNEL_FIRST <= kind <= MSG_CHANNEL_LAST:
                number = packet.get_uint32()
                channel = self._channels.get(number)
                if channel is None:
                    raise asyncssh.ProtocolError(f"Invalid channel number {number} received")
                handler = channel
            result = handler.process_packet(kind, seq, packet)
        except PacketDecodeError as error:
            raise asyncssh.ProtocolError(str(error)) from None
        if inspect.isawaitable(result):
            self._recv_handler = lambda: False  # what follows waits, see asyncssh's _recv_packet
            task = self.create_task(result)
            task.add_done_callback(partial(self._finish_recv_packet, kind, seq, is_async=True))
            return
        if not result:
            self.send_packet(MSG_UNIMPLEMENTED, UInt32(seq))
        self._finish_recv_packet(kind, seq)

    def _recv_pkthdr(self) -> bool:
        """Asyncssh's loop comes through here before each packet: what it holds goes the short path, if it may."""
        if not self.on_fast_path:
            return super()._recv_pkthdr()
        data, self._inpbuf = self._inpbuf, b""
        taken = self._hear_packets(memoryview(data))
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

    # The short path: what is said

    @property
    def can_send(self) -> bool:
        """Whether channels may speak: not while keys are exchanged, which begins here when it is time."""
        if self._kex_complete and (self._rekey_bytes_sent >= self._rekey_bytes or time.monotonic() >= self._rekey_time):
            self.exchange_keys()
        return self._kex_complete

    def exchange_keys(self) -> None:
        """Begin a key exchange, unless one is on its way."""
        if self._kex_complete and self._auth_complete and self._transport is not None:
            self._send_kexinit()
            self._kexinit_sent = True

    def send_data(self, head: bytes, data: memoryview) -> None:
        """A packet of a channel's data; `head` is its kind and the peer's number of the channel."""
        size = len(data)
        self._say(b"".join((head, size.to_bytes(4, "big"), data)))

    def send_packet(self, pkttype: int, *args: bytes, handler: object = None) -> None:
        """Any packet."""
        if pkttype == MSG_IGNORE:
            return
        if self._auth_complete and self._kex_complete and type(self._send_encryption) is Gcm:
            self._say(b"%c%b" % (pkttype, b"".join(args)))
        elif len(self._deferred_packets) >= MAX_DEFERRED_PACKETS:
            self._force_close(asyncssh.ProtocolError("a key exchange without an end"))
        else:
            super().send_packet(pkttype, *args, handler=handler)  # type: ignore[arg-type]

    def _say(self, payload: bytes) -> None:
        cipher = self._send_encryption
        if type(cipher) is not Gcm:
            super().send_packet(payload[0], payload[1:])
            return
        padding = 4 + (11 - len(payload)) % BLOCK
        packet = b"%c%b%b" % (padding, payload, NOISE[:padding])
        size = len(packet)
        header = size.to_bytes(4, "big")
        transport = self.transport
        outgoing = transport.outgoing
        outgoing += header
        outgoing += cipher.seal(header, packet)
        transport.outbox.schedule_flush()
        self._send_seq = (self._send_seq + 1) & 0xFFFFFFFF
        self._rekey_bytes_sent += size

    def send_newkeys(self, k: bytes, h: bytes) -> None:
        """The exchange is done."""
        super().send_newkeys(k, h)
        if self._auth_complete:
            self.on_new_keys()

    # Is it alive?

    def send_keepalive(self) -> None:
        """Ask for a sign of life."""
        self.asked += 1
        self._send_global_request(b"keepalive@openssh.com", want_reply=True)

    def _process_answer(self, _pkttype: int, _pktid: int, _packet: SSHPacket) -> None:
        if not self.asked:
            raise asyncssh.ProtocolError("Unexpected global response")
        self.asked -= 1
        self.on_keepalive_reply()

    def _reset_keepalive_timer(self) -> None:
        """Asyncssh's own, at each arrival; see `Carrier.heartbeat`."""

    _packet_handlers = {  # noqa: RUF012  # asyncssh's table, with ours in it
        **asyncssh.SSHServerConnection._packet_handlers,
        MSG_KEXINIT: RestrictedConnection._process_kexinit,
        MSG_GLOBAL_REQUEST: RestrictedConnection._process_global_request,
        MSG_REQUEST_SUCCESS: _process_answer,
        MSG_REQUEST_FAILURE: _process_answer,
    }
