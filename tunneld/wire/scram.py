"""SCRAM-SHA-256 as messages: both ends of the proof that the other knows a secret, without saying it. Pure.

    client                                                        server
    first         n,,n=NAME,r=CLIENT-NONCE                   ──▶
                                                             ◀──  server-first   r=BOTH-NONCES,s=SALT,i=ITERATIONS
    final         c=biws,r=BOTH-NONCES,p=PROOF               ──▶
                                                             ◀──  server-final   v=SIGNATURE

RFC 5802 with the hash of RFC 7677, without channel binding. The server keeps a `Verifier`, from which the secret cannot
be computed; the client derives its keys anew from salt and iterations. Both sign all that was said before, nonces of
both included, so nothing can be replayed and each learns that the other knows the secret.

Nonces are arguments: no dice here. The library that there is for this (scramp) does more mechanisms than one, in six
times as many lines without types, and brings a parser of X.509 along.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from dataclasses import dataclass, field

from tunneld.errors import NotAllowedError, RemoteProtocolError, UsageError
from tunneld.wire.verifier import (
    DIGEST,
    MAX_ITERATIONS,
    MECHANISM,
    MIN_ITERATIONS,
    Verifier,
    client_and_server_key,
    from_base64,
    sign,
    to_base64,
)

FAILED = "authentication failed"
"""The one reason that is ever told: unknown name, wrong secret and wrong network look alike."""

_COUNT = re.compile(r"[1-9][0-9]{0,8}")
_NONCE = re.compile(r"[\x21-\x2b\x2d-\x7e]{1,512}")  # RFC 5802 §7: printable, without comma; we bound it
_NAME_ESCAPE = re.compile(r"=(?P<code>2C|3D)?")


@dataclass(frozen=True, slots=True)
class Hello:
    """What a client said first (RFC 5802 §7, client-first-message)."""

    header: str  # gs2-header: what the client thinks of channel binding
    name: str
    nonce: str
    bare: str  # the message behind the header: what is signed

    @classmethod
    def parse(cls, message: bytes) -> Hello:
        """Read it. Raises `UsageError`."""
        parts = _text(message).split(",", 2)
        if len(parts) != 3 or parts[0] not in {"n", "y"}:
            raise UsageError(f"not a first message of {MECHANISM} without channel binding: it begins with n,,")
        if parts[1]:
            raise UsageError("to act for somebody else (a=) is not possible here")
        values = _attributes(parts[2], "n", "r")
        return cls(f"{parts[0]},,", _unescape(values["n"]), _nonce(values["r"]), parts[2])


@dataclass(frozen=True, slots=True)
class Challenge:
    """A server's half of one login: `message` is its answer to `hello`, `accept` judges what comes back."""

    hello: Hello
    verifier: Verifier
    nonce: str  # the server's own part: fresh for each login, or a recorded one could be replayed

    @property
    def message(self) -> bytes:
        """The server-first-message."""
        salt = to_base64(self.verifier.salt)
        return f"r={self.hello.nonce}{self.nonce},s={salt},i={self.verifier.iterations}".encode()

    def accept(self, final: bytes) -> bytes:
        """Take the client-final-message; returns the server's own proof.

        Raises `UsageError` where it is none, `NotAllowedError` where it does not prove knowledge of the secret or
        belongs to another challenge.
        """
        values = _attributes(_text(final), "c", "r", "p")
        proof, binding = from_base64(values["p"], "the proof"), from_base64(values["c"], "the channel binding")
        said = final.rpartition(b",p=")[0]
        signed = b",".join([self.hello.bare.encode(), self.message, said])
        signature = sign(self.verifier.stored_key, signed)
        client_key = _xor(proof.ljust(DIGEST)[:DIGEST], signature)
        knows = hmac.compare_digest(hashlib.sha256(client_key).digest(), self.verifier.stored_key)
        fresh = hmac.compare_digest(values["r"].encode(), f"{self.hello.nonce}{self.nonce}".encode())
        bound = hmac.compare_digest(binding, self.hello.header.encode())
        if not (knows and fresh and bound and len(proof) == DIGEST):
            raise NotAllowedError(FAILED)
        return b"v=" + to_base64(sign(self.verifier.server_key, signed)).encode()


@dataclass(frozen=True, slots=True)
class Proof:
    """A client's answer to a challenge: `message` to send, `expected` to hear back."""

    message: bytes
    expected: bytes = field(repr=False)

    def check(self, final: bytes) -> None:
        """Raise `RemoteProtocolError` unless the server-final-message proves that the relay knows the secret, too."""
        if not hmac.compare_digest(final.split(b",")[0], self.expected):
            raise RemoteProtocolError("it does not know the secret")


@dataclass(frozen=True, slots=True)
class ScramClient:
    """A client's half of one login. `nonce` is fresh, printable and without commas."""

    name: str
    secret: str = field(repr=False)
    nonce: str

    @property
    def message(self) -> bytes:
        """The client-first-message."""
        return f"n,,{self._bare}".encode()

    def prove(self, challenge: bytes) -> Proof:
        """Answer the server-first-message. Slow on purpose: call it in a thread.

        Raises `RemoteProtocolError` where it is none or asks for too little or too much work, `UsageError` where the
        secret is not ASCII.
        """
        nonce, salt, iterations = self._read(challenge)
        client_key, server_key = client_and_server_key(self.secret, salt, iterations)
        said = f"c=biws,r={nonce}".encode()
        signed = b",".join([self._bare.encode(), challenge, said])
        signature = sign(hashlib.sha256(client_key).digest(), signed)
        proof = to_base64(_xor(client_key, signature)).encode()
        return Proof(said + b",p=" + proof, b"v=" + to_base64(sign(server_key, signed)).encode())

    @property
    def _bare(self) -> str:
        name = self.name.replace("=", "=3D").replace(",", "=2C")
        return f"n={name},r={self.nonce}"

    def _read(self, challenge: bytes) -> tuple[str, bytes, int]:
        try:
            values = _attributes(_text(challenge), "r", "s", "i")
            nonce, salt = _nonce(values["r"]), from_base64(values["s"], "the salt")
        except UsageError as error:
            raise RemoteProtocolError(f"its challenge is not one of {MECHANISM}: {error}") from None
        if not nonce.startswith(self.nonce) or nonce == self.nonce:
            raise RemoteProtocolError("its challenge does not answer ours: another nonce")
        iterations = int(values["i"]) if _COUNT.fullmatch(values["i"]) else 0
        if not MIN_ITERATIONS <= iterations <= MAX_ITERATIONS:
            asked = f"not between {MIN_ITERATIONS} and {MAX_ITERATIONS}"
            raise RemoteProtocolError(f"it asks for {values['i'][:20]} iterations, {asked}")
        return nonce, salt, iterations


def encode(message: bytes, *, padded: bool = True) -> str:
    """A message as the control protocol carries it. Without padding it can never be taken for a `key=value` word."""
    return to_base64(message) if padded else to_base64(message).rstrip("=")


def decode(text: str) -> bytes:
    """The message in a word of the control protocol, padded or not. Raises `UsageError`."""
    return from_base64(text.rstrip("=") + "=" * (-len(text.rstrip("=")) % 4), "the message")


def _xor(one: bytes, other: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(one, other, strict=True))


def _text(message: bytes) -> str:
    try:
        return message.decode()
    except UnicodeDecodeError:
        raise UsageError(f"message of {MECHANISM} is not UTF-8") from None


def _attributes(text: str, *wanted: str) -> dict[str, str]:
    """The wanted attributes, which come in this order; whatever an extension puts between the last two is let be."""
    parts = [part.partition("=")[::2] for part in text.split(",")]
    names = [name for name, _ in parts]
    head = list(wanted[:-1]) if wanted[-1] == "p" else list(wanted)
    if names[: len(head)] != head or (wanted[-1] == "p" and names[-1] != "p") or len(set(names)) != len(names):
        raise UsageError(f"message of {MECHANISM} has not the attributes {', '.join(wanted)}, each once")
    return dict(parts)


def _nonce(text: str) -> str:
    if not _NONCE.fullmatch(text):
        raise UsageError("the nonce is empty, too long or not printable")
    return text


def _unescape(name: str) -> str:
    """A saslname: a comma is `=2C`, an equals sign `=3D` (RFC 5802 §5.1)."""
    if any(match["code"] is None for match in _NAME_ESCAPE.finditer(name)):
        raise UsageError("the name has an equals sign that is not written as =3D or =2C")
    return name.replace("=2C", ",").replace("=3D", "=")
