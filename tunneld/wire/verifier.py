"""SCRAM verifiers: what a relay stores instead of a secret. The secret cannot be computed from it. Pure.

    SCRAM-SHA-256$ITERATIONS:SALT$STOREDKEY:SERVERKEY          PostgreSQL's format; all but the number in base64

SaltedPassword is PBKDF2 with HMAC-SHA-256 over the secret; StoredKey is the hash of the key that a client proves it
has, ServerKey is the key with which the relay proves that it knows the secret (RFC 5802 §3). Salts are arguments, so
this module needs no randomness.

Secrets are printable ASCII, which SASLprep (RFC 4013) leaves unchanged.
"""

from __future__ import annotations

import binascii
import hashlib
import hmac
import re
from base64 import b64decode, b64encode
from dataclasses import dataclass, field

from tunneld.errors import UsageError

MECHANISM = "SCRAM-SHA-256"

ITERATIONS = 100_000
"""PBKDF2 iterations of new verifiers: about 50 ms, for the client at each login and for an attacker at each guess."""

MIN_ITERATIONS = 4096
"""RFC 7677 §4. A client refuses fewer: a false relay could demand one, and then guess offline from the answer."""

MAX_ITERATIONS = 2_000_000
"""About one second. A client refuses more: a false relay could keep it busy for hours."""

MIN_SECRET = 8
"""Characters, to catch mistakes. An eavesdropper on a login can try guesses offline, so use 20 random ones."""

DIGEST = hashlib.sha256().digest_size
"""Bytes of every key, proof and signature."""

ITERATION_COUNT = re.compile(r"[1-9][0-9]{0,8}")
"""An iteration count as it is written: decimal, without leading zeros."""

_SECRET = re.compile(r"[\x20-\x7e]*")
_VERIFIER = re.compile(r"SCRAM-SHA-256\$(?P<count>[^:$]*):(?P<salt>[^:$]*)\$(?P<stored>[^:$]*):(?P<server>[^:$]*)")


@dataclass(frozen=True, slots=True)
class Verifier:
    """A stored verifier. With it one can pose as the server and guess the secret offline, so it does not print."""

    iterations: int
    salt: bytes = field(repr=False)
    stored_key: bytes = field(repr=False)
    server_key: bytes = field(repr=False)

    @classmethod
    def parse(cls, text: str) -> Verifier:
        """Parse `SCRAM-SHA-256$ITERATIONS:SALT$STOREDKEY:SERVERKEY`. Raises `UsageError`, which does not quote the
        text.
        """
        match = _VERIFIER.fullmatch(text)
        if match is None or not ITERATION_COUNT.fullmatch(match["count"]):
            raise UsageError(f"not of the form {MECHANISM}$ITERATIONS:SALT$STOREDKEY:SERVERKEY")
        iterations = int(match["count"])
        if not MIN_ITERATIONS <= iterations <= MAX_ITERATIONS:
            raise UsageError(f"{iterations} iterations are not between {MIN_ITERATIONS} and {MAX_ITERATIONS}")
        salt, stored, server = (from_base64(match[key], "a verifier") for key in ("salt", "stored", "server"))
        if not salt or len(stored) != DIGEST or len(server) != DIGEST:
            raise UsageError(f"the salt is empty or a key does not have {DIGEST} bytes")
        return cls(iterations, salt, stored, server)

    def reveal(self) -> str:
        """The text that `parse` accepts."""
        salt, stored, server = (to_base64(part) for part in (self.salt, self.stored_key, self.server_key))
        return f"{MECHANISM}${self.iterations}:{salt}${stored}:{server}"

    def __str__(self) -> str:
        return f"{MECHANISM}$..."


def derive(secret: str, salt: bytes, iterations: int = ITERATIONS) -> Verifier:
    """The verifier of a secret (RFC 5802 §3). Slow by design. Raises `UsageError` if the secret is not ASCII."""
    client_key, server_key = client_and_server_key(secret, salt, iterations)
    return Verifier(iterations, salt, hashlib.sha256(client_key).digest(), server_key)


def check_secret(secret: str) -> None:
    """Raise `UsageError`, which does not quote the secret, unless it is acceptable as a new secret."""
    if not _SECRET.fullmatch(secret):
        raise UsageError("a secret consists of printable ASCII characters on one line")
    if len(secret) < MIN_SECRET:
        raise UsageError(f"a secret has at least {MIN_SECRET} characters; use 20 random ones")


def matches(verifier: Verifier, secret: str) -> bool:
    """Whether a plaintext secret matches the verifier. Takes as long as `derive`, whatever the result."""
    try:
        derived = derive(secret, verifier.salt, verifier.iterations)
    except UsageError:
        return False
    return hmac.compare_digest(derived.stored_key, verifier.stored_key)


def client_and_server_key(secret: str, salt: bytes, iterations: int) -> tuple[bytes, bytes]:
    """ClientKey and ServerKey (RFC 5802 §3). Raises `UsageError` if the secret is not ASCII."""
    if not _SECRET.fullmatch(secret):
        raise UsageError("a secret consists of printable ASCII characters on one line")
    salted = hashlib.pbkdf2_hmac("sha256", secret.encode(), salt, iterations)
    return sign(salted, b"Client Key"), sign(salted, b"Server Key")


def sign(key: bytes, message: bytes) -> bytes:
    """HMAC-SHA-256."""
    return hmac.digest(key, message, "sha256")


def to_base64(data: bytes) -> str:
    """`data` in base64."""
    return b64encode(data).decode()


def from_base64(text: str, what: str) -> bytes:
    """Decode base64. Raises `UsageError`, which calls the text `what`."""
    try:
        return b64decode(text.encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError):
        raise UsageError(f"{what} is not in base64") from None
