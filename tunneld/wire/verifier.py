"""What a relay keeps of a secret: a verifier, from which the secret cannot be computed. Pure.

    SCRAM-SHA-256$ITERATIONS:SALT$STOREDKEY:SERVERKEY          as PostgreSQL keeps it; all but the number in base64

SaltedPassword is PBKDF2 with HMAC-SHA-256 over the secret; StoredKey is the hash of what a client proves that it has,
ServerKey is what the relay proves its own knowledge with (RFC 5802 §3). Salts are arguments: no dice here.

Secrets are printable ASCII, for which SASLprep (RFC 4013) changes nothing.
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
"""Rounds of PBKDF2 for new verifiers: about 50 ms, spent by the client at each login and by a thief at each guess."""

MIN_ITERATIONS = 4096
"""RFC 7677 §4. A client refuses fewer: a false relay could ask for one, and guess from the answer at leisure."""

MAX_ITERATIONS = 2_000_000
"""About a second. A client refuses more: a false relay could keep it busy for hours."""

MIN_SECRET = 8
"""Characters: a floor against slips. Whoever overhears a login can try guesses, so take 20 random ones."""

DIGEST = hashlib.sha256().digest_size
"""Octets of every key, proof and signature."""

_COUNT = re.compile(r"[1-9][0-9]{0,8}")
_SECRET = re.compile(r"[\x20-\x7e]*")
_VERIFIER = re.compile(r"SCRAM-SHA-256\$(?P<count>[^:$]*):(?P<salt>[^:$]*)\$(?P<stored>[^:$]*):(?P<server>[^:$]*)")


@dataclass(frozen=True, slots=True)
class Verifier:
    """What a server keeps of a secret. Whoever has it can pose as the server, and try guesses; so it does not print."""

    iterations: int
    salt: bytes = field(repr=False)
    stored_key: bytes = field(repr=False)
    server_key: bytes = field(repr=False)

    @classmethod
    def parse(cls, text: str) -> Verifier:
        """Read `SCRAM-SHA-256$ITERATIONS:SALT$STOREDKEY:SERVERKEY`, as PostgreSQL keeps it. Raises `UsageError`, which
        repeats nothing of the text.
        """
        match = _VERIFIER.fullmatch(text)
        if match is None or not _COUNT.fullmatch(match["count"]):
            raise UsageError(f"not of the form {MECHANISM}$ITERATIONS:SALT$STOREDKEY:SERVERKEY")
        iterations = int(match["count"])
        if not MIN_ITERATIONS <= iterations <= MAX_ITERATIONS:
            raise UsageError(f"{iterations} iterations are not between {MIN_ITERATIONS} and {MAX_ITERATIONS}")
        salt, stored, server = (from_base64(match[key], "a verifier") for key in ("salt", "stored", "server"))
        if not salt or len(stored) != DIGEST or len(server) != DIGEST:
            raise UsageError(f"its salt is empty or one of its keys is not of {DIGEST} octets")
        return cls(iterations, salt, stored, server)

    def reveal(self) -> str:
        """What `parse` reads."""
        salt, stored, server = (to_base64(part) for part in (self.salt, self.stored_key, self.server_key))
        return f"{MECHANISM}${self.iterations}:{salt}${stored}:{server}"

    def __str__(self) -> str:
        return f"{MECHANISM}$..."


def derive(secret: str, salt: bytes, iterations: int = ITERATIONS) -> Verifier:
    """The verifier of a secret (RFC 5802 §3). Slow on purpose. Raises `UsageError` where the secret is not ASCII."""
    client_key, server_key = client_and_server_key(secret, salt, iterations)
    return Verifier(iterations, salt, hashlib.sha256(client_key).digest(), server_key)


def check_secret(secret: str) -> None:
    """Raise `UsageError`, which repeats nothing of it, unless this is fit to be a new secret."""
    if not _SECRET.fullmatch(secret):
        raise UsageError("a secret is made of printable ASCII characters, on one line")
    if len(secret) < MIN_SECRET:
        raise UsageError(f"a secret has at least {MIN_SECRET} characters; 20 random ones are good")


def matches(verifier: Verifier, secret: str) -> bool:
    """Whether a secret said in clear is the verifier's. As slow as `derive`, whatever the answer."""
    try:
        derived = derive(secret, verifier.salt, verifier.iterations)
    except UsageError:
        return False
    return hmac.compare_digest(derived.stored_key, verifier.stored_key)


def client_and_server_key(secret: str, salt: bytes, iterations: int) -> tuple[bytes, bytes]:
    """ClientKey and ServerKey (RFC 5802 §3). Raises `UsageError` where the secret is not ASCII."""
    if not _SECRET.fullmatch(secret):
        raise UsageError("a secret is made of printable ASCII characters, on one line")
    salted = hashlib.pbkdf2_hmac("sha256", secret.encode(), salt, iterations)
    return sign(salted, b"Client Key"), sign(salted, b"Server Key")


def sign(key: bytes, message: bytes) -> bytes:
    """HMAC-SHA-256."""
    return hmac.digest(key, message, "sha256")


def to_base64(octets: bytes) -> str:
    """Octets as text."""
    return b64encode(octets).decode()


def from_base64(text: str, what: str) -> bytes:
    """The octets again. Raises `UsageError` that names `what` the text is."""
    try:
        return b64decode(text.encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError):
        raise UsageError(f"{what} is not in base64") from None
