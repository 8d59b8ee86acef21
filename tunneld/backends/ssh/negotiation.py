"""Which algorithms, and by whose order.

**Which cipher.** The client's order decides (RFC 4253, section 7.1), and OpenSSH has ChaCha20 first, which costs an
interpreter seven times as much as AES-GCM. So the server's offer waits for the client's, and is one kind: GCM where the
client has it. Where a client does not have strict key exchange, what needs it (CVE-2023-48795) is not offered.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import asyncssh
from asyncssh.packet import SSHPacket

from tunneld.backends.ssh.gcm import NAMES

PATIENT_FOR = 1.0
"""Seconds for a client's offer; then ours goes first, for a client that waits for it."""
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


class NegotiatingConnection(asyncssh.SSHServerConnection):
    """A connection whose first offer waits for the client's."""

    def __init__(self, loop: asyncio.AbstractEventLoop, options: asyncssh.SSHServerConnectionOptions) -> None:
        super().__init__(loop, options)
        self._offered = False
        self._timer = loop.call_later(PATIENT_FOR, self._offer)

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
