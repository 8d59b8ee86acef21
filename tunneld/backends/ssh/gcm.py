"""AES-GCM as SSH uses it (RFC 5647, with OpenSSH's names), one context a key.

asyncssh makes a new one for each packet, which costs as much as the packet. Registered under the same names, this one
serves all of asyncssh, and gives the short path what it needs: `seal` and `open`, which take views and copy nothing.
"""

from __future__ import annotations

from asyncssh.encryption import Encryption, register_encryption_alg
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

TAG = 16
"""Octets of a tag."""
COUNTS = 1 << 64
"""Of the invocation counter."""

NAMES = (b"aes128-gcm@openssh.com", b"aes256-gcm@openssh.com")


class Gcm(Encryption):
    """One direction of a connection, between two key exchanges."""

    __slots__ = ("_cipher", "_count", "_fixed")

    def __init__(self, key: bytes, iv: bytes) -> None:
        self._cipher = AESGCM(key)
        self._fixed = iv[:4]
        self._count = int.from_bytes(iv[4:], "big")

    @classmethod
    def new(
        cls, cipher_name: str, key: bytes, iv: bytes, mac_alg: bytes = b"", mac_key: bytes = b"", etm: bool = False
    ) -> Gcm:
        """See `Encryption`."""
        return cls(key, iv)

    @classmethod
    def needs_mac(cls) -> bool:
        """It is one."""
        return False

    @classmethod
    def get_mac_params(cls, mac_alg: bytes) -> tuple[int, int, bool]:
        """Octets of the key, of the tag; the length is not enciphered."""
        return 0, TAG, True

    # The short path

    def seal(self, header: bytes, packet: bytes) -> bytes:
        """The packet enciphered, with its tag; `header` is its length, as it goes in front."""
        count = self._count
        self._count = (count + 1) % COUNTS
        return self._cipher.encrypt(self._fixed + count.to_bytes(8, "big"), packet, header)

    def open(self, header: memoryview, packet: memoryview) -> bytes:
        """The packet deciphered; it has its tag behind. Raises `InvalidTag`."""
        count = self._count
        self._count = (count + 1) % COUNTS
        return self._cipher.decrypt(self._fixed + count.to_bytes(8, "big"), packet, header)

    # asyncssh's

    def encrypt_packet(self, seq: int, header: bytes, packet: bytes) -> tuple[bytes, bytes]:
        """See `Encryption`."""
        sealed = self.seal(header, packet)
        return header + sealed[:-TAG], sealed[-TAG:]

    def decrypt_header(self, seq: int, first_block: bytes, header_len: int) -> tuple[bytes, bytes]:
        """See `Encryption`."""
        return first_block, first_block[:header_len]

    def decrypt_packet(self, seq: int, first: bytes, rest: bytes, header_len: int, mac: bytes) -> bytes | None:
        """See `Encryption`; None where the tag does not fit."""
        try:
            return self.open(memoryview(first)[:header_len], memoryview(first[header_len:] + rest + mac))
        except InvalidTag:
            return None


def register() -> None:
    """Take the place of asyncssh's own. Harmless when repeated."""
    for name in NAMES:
        register_encryption_alg(name, Gcm, name.partition(b"@")[0].decode(), default=True)
