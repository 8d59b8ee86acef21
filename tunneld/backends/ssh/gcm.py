"""AES-GCM as SSH uses it (RFC 5647, under OpenSSH's names), with one cipher context per key.

asyncssh creates a new context per packet, which costs as much as the packet. This class is registered under the same
names and serves all of asyncssh. For the fast path it has `seal` and `open`, which take views and copy nothing.
"""

from __future__ import annotations

from asyncssh.encryption import Encryption, register_encryption_alg
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

TAG_BYTES = 16
INVOCATION_COUNTS = 1 << 64
"""The invocation counter is 64 bits wide (RFC 5647, section 7.1)."""

GCM_CIPHERS = (b"aes128-gcm@openssh.com", b"aes256-gcm@openssh.com")


class Gcm(Encryption):
    """The cipher of one direction of a connection, between two key exchanges."""

    __slots__ = ("_cipher", "_count", "_fixed")

    def __init__(self, key: bytes, iv: bytes) -> None:
        """The first 4 bytes of `iv` are fixed, and the other 8 are the first value of the invocation counter."""
        self._cipher = AESGCM(key)
        self._fixed = iv[:4]
        self._count = int.from_bytes(iv[4:], "big")

    @classmethod
    def new(
        cls, cipher_name: str, key: bytes, iv: bytes, mac_alg: bytes = b"", mac_key: bytes = b"", etm: bool = False
    ) -> Gcm:
        """See `Encryption.new`."""
        return cls(key, iv)

    @classmethod
    def needs_mac(cls) -> bool:
        """False: the cipher authenticates."""
        return False

    @classmethod
    def get_mac_params(cls, mac_alg: bytes) -> tuple[int, int, bool]:
        """Bytes of the MAC key, bytes of the tag, and whether the packet's length is sent unencrypted."""
        return 0, TAG_BYTES, True

    # Fast path

    def seal(self, header: bytes, packet: bytes) -> bytes:
        """The encrypted packet followed by its tag. `header` is the packet's length field, which is authenticated."""
        count = self._count
        self._count = (count + 1) % INVOCATION_COUNTS
        return self._cipher.encrypt(self._fixed + count.to_bytes(8, "big"), packet, header)

    def open(self, header: memoryview, packet: memoryview) -> bytes:
        """The decrypted packet; `packet` is followed by its tag. Raises `InvalidTag`."""
        count = self._count
        self._count = (count + 1) % INVOCATION_COUNTS
        return self._cipher.decrypt(self._fixed + count.to_bytes(8, "big"), packet, header)

    # asyncssh's interface

    def encrypt_packet(self, seq: int, header: bytes, packet: bytes) -> tuple[bytes, bytes]:
        """See `Encryption.encrypt_packet`."""
        sealed = self.seal(header, packet)
        return header + sealed[:-TAG_BYTES], sealed[-TAG_BYTES:]

    def decrypt_header(self, seq: int, first_block: bytes, header_len: int) -> tuple[bytes, bytes]:
        """See `Encryption.decrypt_header`."""
        return first_block, first_block[:header_len]

    def decrypt_packet(self, seq: int, first: bytes, rest: bytes, header_len: int, mac: bytes) -> bytes | None:
        """See `Encryption.decrypt_packet`. None if the tag is wrong."""
        try:
            return self.open(memoryview(first)[:header_len], memoryview(first[header_len:] + rest + mac))
        except InvalidTag:
            return None


def register() -> None:
    """Replace asyncssh's AES-GCM in this process. Idempotent."""
    for name in GCM_CIPHERS:
        register_encryption_alg(name, Gcm, name.partition(b"@")[0].decode(), default=True)
