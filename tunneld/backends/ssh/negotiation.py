"""Negotiation of algorithms: what the relay offers, and when.

**Which cipher.** The client's order decides (RFC 4253, section 7.1), and OpenSSH lists ChaCha20 first, which costs
Python seven times as much as AES-GCM. The relay therefore waits for the client's offer and offers one family of
ciphers: GCM if the client has it. To a client without strict key exchange, ciphers that need it (CVE-2023-48795) are
not offered.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import asyncssh
from asyncssh.packet import SSHPacket

from tunneld.backends.ssh.gcm import GCM_CIPHERS

OFFER_DELAY = 1.0
"""Seconds to wait for the client's offer. Then the relay's goes first, in case the client waits for it."""
STRICT_KEX = b"kex-strict-c-v00@openssh.com"
CHACHA20 = b"chacha20-poly1305@openssh.com"
CTR_CIPHERS = (b"aes256-ctr", b"aes192-ctr", b"aes128-ctr")
ETM_MACS = (b"hmac-sha2-256-etm@openssh.com", b"hmac-sha2-512-etm@openssh.com")
MACS = (b"hmac-sha2-256", b"hmac-sha2-512")


def choose_ciphers(client_ciphers: Sequence[bytes], *, strict: bool) -> tuple[bytes, ...]:
    """The ciphers to offer to a client that offers these. `strict`: it supports strict key exchange."""
    families = (GCM_CIPHERS, (CHACHA20,), CTR_CIPHERS) if strict else (GCM_CIPHERS, CTR_CIPHERS)
    return next(
        (family for family in families if any(name in client_ciphers for name in family)), GCM_CIPHERS + CTR_CIPHERS
    )


def guessed_packet_follows(kexinit: SSHPacket) -> bool:
    """The flag `first_kex_packet_follows` of a KEXINIT: the byte before its last four."""
    return kexinit.get_full_payload()[-5:-4] == b"\1"


class NegotiatingConnection(asyncssh.SSHServerConnection):
    """A server connection that sends its first offer after the client's."""

    def __init__(self, loop: asyncio.AbstractEventLoop, options: asyncssh.SSHServerConnectionOptions) -> None:
        super().__init__(loop, options)
        self._offered = False
        self._offer_timer = loop.call_later(OFFER_DELAY, self._offer)

    def _send_kexinit(self) -> None:
        """Send an offer, as asyncssh requests; the first one is delayed until `_offer`."""
        if self._offered:
            super()._send_kexinit()

    def _offer(self, client_ciphers: Sequence[bytes] = (), *, strict: bool = False) -> None:
        """Send the first offer, unless that was done."""
        self._offer_timer.cancel()
        if self._offered or self._transport is None or not self._kexinit_sent:
            return  # not sent: the client's version has not arrived yet
        self._offered = True
        self._enc_algs = list(choose_ciphers(client_ciphers, strict=strict))
        self._mac_algs = [*(ETM_MACS if strict else ()), *MACS]
        super()._send_kexinit()

    async def _process_kexinit(self, pkttype: int, pktid: int, packet: SSHPacket) -> None:
        """Offer our algorithms in the client's order.

        A client may guess the result and send its next packet at once. The guess is right if both lists begin with the
        same name (RFC 4253, section 7), which asyncssh does not check.
        """
        offer = SSHPacket(packet.get_full_payload())
        offer.get_bytes(17)  # the packet type and the cookie
        exchanges, host_keys, ciphers = offer.get_namelist(), offer.get_namelist(), offer.get_namelist()
        if not self._offered:
            common = (name for name in exchanges if name in self._kex_algs)
            self._kex_algs = list(dict.fromkeys((*common, *self._kex_algs)))
            self._offer(ciphers, strict=STRICT_KEX in exchanges)
        is_right = exchanges[:1] == self._kex_algs[:1] and host_keys[:1] == list(self._server_host_keys)[:1]
        await super()._process_kexinit(pkttype, pktid, packet)
        if not is_right and guessed_packet_follows(packet):
            self._ignore_first_kex = True
