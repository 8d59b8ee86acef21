"""Node ids: by which two ends of a private tunnel, and EGTP nodes, know each other's keys. Pure.

    s3twl9lELuFe149E6B-RDUyS7OI          27 characters of URL-safe base64, which EGTP calls mojosixbit

The id of an Ed25519 key is the SHA-256 of its SubjectPublicKeyInfo in DER, cut to 20 bytes; `tunneld.tls.identity` says
why that is enough. Other keys may have other rules: a `NodeId` is only a value.
"""

from __future__ import annotations

import binascii
import hashlib
import re
from base64 import urlsafe_b64decode, urlsafe_b64encode
from dataclasses import dataclass

from tunneld.errors import UsageError

NODE_ID_BYTES = 20
"""Size of an id: 160 bits, as of every id in EGTP."""
ED25519_KEY_BYTES = 32
"""Size of an Ed25519 public key."""
_ED25519_SPKI = bytes.fromhex("302a300506032b6570032100")
"""SubjectPublicKeyInfo of an Ed25519 key in DER, without the bytes of the key (RFC 8410 §4)."""
_TEXT = re.compile(r"[A-Za-z0-9_-]{27}", re.ASCII)


@dataclass(frozen=True, slots=True, order=True)
class NodeId:
    """The id of a node: `NODE_ID_BYTES` bytes. `str` is its text."""

    digest: bytes

    def __post_init__(self) -> None:
        if len(self.digest) != NODE_ID_BYTES:
            raise UsageError(f"a node id has {NODE_ID_BYTES} bytes, not {len(self.digest)}")

    @classmethod
    def parse(cls, text: str) -> NodeId:
        """Parse what `str` prints, and nothing else that decodes to the same bytes. Raises `UsageError`."""
        try:
            found = cls(urlsafe_b64decode(f"{text}=")) if _TEXT.fullmatch(text) else None
        except binascii.Error:
            found = None
        if found is None or str(found) != text:
            raise UsageError(f"not a node id of 27 letters, digits, - and _, as `tunnel identity` prints it: {text!r}")
        return found

    @classmethod
    def of_key(cls, public_key: bytes) -> NodeId:
        """The id of an Ed25519 public key of `ED25519_KEY_BYTES` bytes."""
        return cls(hashlib.sha256(_ED25519_SPKI + public_key).digest()[:NODE_ID_BYTES])

    def __str__(self) -> str:
        return urlsafe_b64encode(self.digest).decode().rstrip("=")
