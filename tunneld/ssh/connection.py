"""asyncssh's connection, on the short path, and with less of it.

**The short path.** Once a peer is known and speaks AES-GCM, `hear` opens packets where they lie in the pump's buffer,
and `say_data` seals a channel's octets straight into the outgoing ones. Data goes to the carrier; everything else, and
every connection that is not there yet or is exchanging keys, goes asyncssh's way. What asyncssh does there that costs
more than it is worth to us is left out: an empty packet before each (a remedy for CBC), a log line and a new cipher
context each.

**Which cipher.** The client's order decides (RFC 4253, section 7.1), and OpenSSH has ChaCha20 first, which costs an
interpreter seven times as much as AES-GCM. So the server's offer waits for the client's, and is one kind: GCM where the
client has it. Where a client does not have strict key exchange, what needs it (CVE-2023-48795) is not offered.

**Not answered** are all requests and channels but `-R`, its end, and sessions (see `words`).
"""

from __future__ import annotations

import asyncio
import inspect
import os
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import asyncssh
import structlog
from asyncssh.constants import (
    DISC_NO_MORE_AUTH_METHODS_AVAILABLE,
    DISC_TOO_MANY_CONNECTIONS,
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
from asyncssh.misc import OptExcInfo
from asyncssh.packet import PacketDecodeError, SSHPacket, SSHPacketHandler, UInt32
from cryptography.exceptions import InvalidTag

from tunneld.ssh.gcm import NAMES, TAG, Gcm

if TYPE_CHECKING:
    from tunneld.ssh.transport import Transport

log = structlog.get_logger("ssh")

MAX_PACKET = 64 * 1024
"""Octets of a channel's data in one packet that we take: half the packets of OpenSSH's usual 32 KiB, where it obeys."""
OVERHEAD = 1024
"""Octets that a packet may have beyond its data."""
PATIENT_FOR = 1.0
"""Seconds for a client's offer; then ours goes first, for a client that waits for it."""
TRIES = 6
"""Failed proofs on one connection; OpenSSH's MaxAuthTries: an agent may have several keys."""
QUEUE = 64
"""Requests that wait for an answer on one connection: more -R than `max_forwards` takes, by default."""
BLOCK = 16
SUSPENDED = 64 * 1024
"""Octets that arrive while a key exchange or a proof is computed; then no more is read."""
NOISE = os.urandom(2 * BLOCK)
"""Padding; under an authenticated cipher nothing depends on it."""

MEANINGLESS = (PacketDecodeError, ValueError, asyncssh.Error)
"""What asyncssh raises of octets that it cannot read."""

STRICT = b"kex-strict-c-v00@openssh.com"
CHACHA = b"chacha20-poly1305@openssh.com"
COUNTERS = (b"aes256-ctr", b"aes192-ctr", b"aes128-ctr")
LATE_MACS = (b"hmac-sha2-256-etm@openssh.com", b"hmac-sha2-512-etm@openssh.com")
MACS = (b"hmac-sha2-256", b"hmac-sha2-512")
EXCHANGES = (
    "mlkem768x25519-sha256",
    "sntrup761x25519-sha512@openssh.com",
    "curve25519-sha256",
    "curve25519-sha256@libssh.org",
    "ecdh-sha2-nistp256",
    "ecdh-sha2-nistp384",
    "ecdh-sha2-nistp521",
)
"""What a peer may exchange keys by: no finite fields, which cost a stranger little and us much."""


def choose(theirs: Sequence[bytes], *, strict: bool) -> tuple[bytes, ...]:
    """The ciphers to offer to a client that offers `theirs`. Pure."""
    families = (NAMES, (CHACHA,), COUNTERS) if strict else (NAMES, COUNTERS)
    return next((family for family in families if any(name in theirs for name in family)), NAMES + COUNTERS)


def packet_follows(kexinit: SSHPacket) -> bool:
    """Whether the client sends a packet on a guess: the octet in front of the last four."""
    return kexinit.get_full_payload()[-5:-4] == b"\1"


class Connection(asyncssh.SSHServerConnection):
    """One client's connection."""

    transport: Transport
    hear_data: Callable[[int, bytes, int, int], None]  # a channel, a packet of ours, and where in it its data lies
    hear_sign: Callable[[], None]  # a keepalive was answered
    hear_keys: Callable[[], None]  # new keys are in use: channels may speak

    def __init__(self, loop: asyncio.AbstractEventLoop, options: asyncssh.SSHServerConnectionOptions) -> None:
        super().__init__(loop, options)
        self.failures = 0  # proofs that were wrong
        self.proof = ""  # the fingerprint of the last key that was known
        self.follow: Callable[[], None] | None = None  # what is to come right after the next answer
        self.is_ending = False
        self.farewell: Exception | None = None
        self.asked = 0  # keepalives that wait for an answer
        self._offered = False
        self._timer = loop.call_later(PATIENT_FOR, self._offer)
        self._max_packet = MAX_PACKET + OVERHEAD
        self._update_recv_pktlen(MAX_PACKET)

    # The short path: what arrives

    @property
    def is_quick(self) -> bool:
        """Whether packets arrive by the short path."""
        return type(self._recv_encryption) is Gcm and self._auth_complete and self._recv_handler == self._recv_pkthdr

    @property
    def is_busy(self) -> bool:
        """See `Hearer`."""
        return len(self._inpbuf) > SUSPENDED and self._recv_handler != self._recv_pkthdr

    @property
    def channel_count(self) -> int:
        """Of all kinds, also those of which the peer has not said that they are closed."""
        return len(self._channels)

    def take_rest(self) -> bytes:
        """See `Hearer`."""
        if not self.is_quick:
            return b""
        rest, self._inpbuf = self._inpbuf, b""
        return rest

    def hear(self, data: memoryview) -> None:
        """See `Hearer`."""
        octets = len(data)
        try:
            while data and self.is_quick and (taken := self._hear_packets(data)):
                data = data[taken:]
            if data:
                self._inpbuf += bytes(data)
                if not self.is_quick:
                    self._recv_data()
            self._rekey_bytes_sent += octets  # both ways: who only sends to us may not think of it
            if self._rekey_bytes_sent >= self._rekey_bytes:
                self.exchange_keys()
        except asyncssh.DisconnectError as error:
            self._send_disconnect(error.code, error.reason, error.lang)
            self._force_close(error if isinstance(error, Exception) else None)

    def _hear_packets(self, data: memoryview) -> int:
        """Open and obey packets, as many as are whole; returns the octets that they took."""
        cipher = self._recv_encryption
        assert isinstance(cipher, Gcm)
        at, end, most, hear_data = 0, len(data), self._max_packet, self.hear_data
        while end - at >= BLOCK:
            size = int.from_bytes(data[at : at + 4], "big")
            if size > most:
                raise asyncssh.ProtocolError(f"a packet of {size} octets is too large")
            after = at + 4 + size + TAG
            if after > end:
                break
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
                if not self.is_quick or self._recv_encryption is not cipher or self._transport is None:
                    return at
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
        if not self.is_quick:
            return super()._recv_pkthdr()
        data, self._inpbuf = self._inpbuf, b""
        taken = self._hear_packets(memoryview(data))
        self._inpbuf = data[taken:] + self._inpbuf
        return taken > 0

    def _finish_recv_packet(
        self, pkttype: int, seq: int, _task: asyncio.Task[None] | None = None, is_async: bool = False
    ) -> None:
        super()._finish_recv_packet(pkttype, seq, _task, is_async)
        if is_async:
            self.transport.resume_reading()

    # The short path: what is said

    @property
    def may_say(self) -> bool:
        """Whether channels may speak: not while keys are exchanged, which begins here when it is time."""
        if self._kex_complete and (self._rekey_bytes_sent >= self._rekey_bytes or time.monotonic() >= self._rekey_time):
            self.exchange_keys()
        return self._kex_complete

    def exchange_keys(self) -> None:
        """Begin a key exchange, unless one is on its way."""
        if self._kex_complete and self._auth_complete and self._transport is not None:
            self._send_kexinit()
            self._kexinit_sent = True

    def say_data(self, head: bytes, data: memoryview) -> None:
        """A packet of a channel's data; `head` is its kind and the peer's number of the channel."""
        size = len(data)
        self._say(b"".join((head, size.to_bytes(4, "big"), data)))

    def send_packet(self, pkttype: int, *args: bytes, handler: object = None) -> None:
        """Any packet."""
        if pkttype == MSG_IGNORE:
            return
        if self._auth_complete and self._kex_complete and type(self._send_encryption) is Gcm:
            self._say(b"%c%b" % (pkttype, b"".join(args)))
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
        transport.outbox.touch()
        self._send_seq = (self._send_seq + 1) & 0xFFFFFFFF
        self._rekey_bytes_sent += size

    # Key exchange

    def _send_kexinit(self) -> None:
        """The first is put off until it is known what the client has."""
        if self._offered:
            super()._send_kexinit()

    def _offer(self, theirs: Sequence[bytes] = (), *, strict: bool = False) -> None:
        """Send the first offer. Nothing where that was done."""
        self._timer.cancel()
        if self._offered or self._transport is None or not self._kexinit_sent:
            return  # the last: the client's version is not even known
        self._offered = True
        self._enc_algs = list(choose(theirs, strict=strict))
        self._mac_algs = [*(LATE_MACS if strict else ()), *MACS]
        super()._send_kexinit()

    async def _process_kexinit(self, pkttype: int, pktid: int, packet: SSHPacket) -> None:
        """A client may guess what will be chosen, and go on at once. It guessed right where both have the same at the
        head of their lists (RFC 4253, section 7), which asyncssh does not ask; so ours are in the client's order.
        """
        look = SSHPacket(packet.get_full_payload())
        look.get_bytes(17)  # the kind, the cookie
        exchanges, host_keys, ciphers = look.get_namelist(), look.get_namelist(), look.get_namelist()
        if not self._offered:
            common = (name for name in exchanges if name in self._kex_algs)
            self._kex_algs = list(dict.fromkeys((*common, *self._kex_algs)))
            self._offer(ciphers, strict=STRICT in exchanges)
        is_right = exchanges[:1] == self._kex_algs[:1] and host_keys[:1] == list(self._server_host_keys)[:1]
        await super()._process_kexinit(pkttype, pktid, packet)
        if not is_right and packet_follows(packet):
            self._ignore_first_kex = True

    def send_newkeys(self, k: bytes, h: bytes) -> None:
        """The exchange is done."""
        super().send_newkeys(k, h)
        if self._auth_complete:
            self.hear_keys()

    # Is it alive?

    def ask(self) -> None:
        """Ask for a sign of life."""
        self.asked += 1
        self._send_global_request(b"keepalive@openssh.com", want_reply=True)

    def _process_answer(self, _pkttype: int, _pktid: int, _packet: SSHPacket) -> None:
        if not self.asked:
            raise asyncssh.ProtocolError("Unexpected global response")
        self.asked -= 1
        self.hear_sign()

    def _reset_keepalive_timer(self) -> None:
        """Asyncssh's own, at each arrival; see `Carrier.heartbeat`."""

    # Proofs

    async def _validate_client_certificate(self, username: str, key_data: bytes) -> asyncssh.SSHKey | None:
        return self._note(await super()._validate_client_certificate(username, key_data))

    async def _validate_client_public_key(self, username: str, key_data: bytes) -> asyncssh.SSHKey | None:
        return self._note(await super()._validate_client_public_key(username, key_data))

    def _note(self, key: asyncssh.SSHKey | None) -> asyncssh.SSHKey | None:
        """The last one before a login is the one that was proved: nothing comes between."""
        if key is not None:
            self.proof = key.get_fingerprint()
        return key

    def create_task(
        self, coro: Awaitable[None], task_logger: asyncssh.logging.SSHLogger | None = None
    ) -> asyncio.Task[None]:
        """The loop is the connection's, also where the pump's task is the one that runs, which has none."""
        assert inspect.iscoroutine(coro)
        task: asyncio.Task[None] = self._loop.create_task(coro)
        task.add_done_callback(partial(self._reap_task, task_logger))
        self._tasks.add(task)
        return task

    def _force_close(self, exc: Exception | None) -> None:
        """Why it ends is known before the socket is closed; None: the client said good-bye."""
        if self._transport is not None:
            self.is_ending, self.farewell = True, exc
        super()._force_close(exc)

    def internal_error(self, exc_info: OptExcInfo | None = None, error_logger: object = None) -> None:
        """What nobody expected. Octets that mean nothing are the peer's fault; all else is a bug, ours or asyncssh's:
        it costs the connection, and is not kept from anybody.
        """
        error = sys.exc_info()[1] if exc_info is None else exc_info[1]
        if isinstance(error, MEANINGLESS):
            error = asyncssh.ProtocolError(f"what it said means nothing: {error}")
            self._send_disconnect(error.code, error.reason, error.lang)
        else:
            log.error("ssh connection failed: a bug", exc_info=error)
        self._force_close(error if isinstance(error, Exception) else None)

    async def _finish_port_forward(self, listen_host: str, listen_port: int) -> None:
        if self._owner is not None:  # it may have gone since
            await super()._finish_port_forward(listen_host, listen_port)

    # What is not answered, and how often one may try

    async def reload_config(self) -> None:
        """There is no file of asyncssh's to read for this user."""

    def send_userauth_failure(self, partial_success: bool) -> None:
        """Once more, or good-bye."""
        self.failures += 1
        if self.failures > TRIES + 1:  # the first is mostly `none`, by which clients ask what there is
            raise asyncssh.DisconnectError(DISC_NO_MORE_AUTH_METHODS_AVAILABLE, f"{TRIES} proofs failed")
        super().send_userauth_failure(partial_success)

    def _process_global_request(self, pkttype: int, pktid: int, packet: SSHPacket) -> None:
        if len(self._global_request_queue) >= QUEUE:
            raise asyncssh.DisconnectError(DISC_TOO_MANY_CONNECTIONS, f"{QUEUE} requests wait for an answer")
        super()._process_global_request(pkttype, pktid, packet)

    def _report_global_response(self, result: bool | bytes) -> None:
        """A client that asked for any port knows from the answer which it is, and refuses visitors before that."""
        follow, self.follow = self.follow, None
        super()._report_global_response(result)
        if follow is not None:
            follow()

    def _process_cancel_tcpip_forward_global_request(self, packet: SSHPacket) -> None:
        look = SSHPacket(packet.get_remaining_payload())
        host, port = look.get_string().decode(errors="replace").lower(), look.get_uint32()
        if (host, port) in self._local_listeners:
            super()._process_cancel_tcpip_forward_global_request(packet)
        else:
            self._report_global_response(False)

    def _process_answerless(self, packet: SSHPacket) -> None:
        self._report_global_response(False)

    _process_hostkeys_prove_00_at_openssh_dot_com_global_request = _process_answerless
    _process_cancel_streamlocal_forward_at_openssh_dot_com_global_request = _process_answerless

    _packet_handlers = {  # noqa: RUF012  # asyncssh's table, with ours in it
        **asyncssh.SSHServerConnection._packet_handlers,
        MSG_KEXINIT: _process_kexinit,
        MSG_GLOBAL_REQUEST: _process_global_request,
        MSG_REQUEST_SUCCESS: _process_answer,
        MSG_REQUEST_FAILURE: _process_answer,
    }
