"""SCRAM-SHA-256 messages: client and server prove to each other that they know a secret, without sending it. Pure.

    client                                                        server
    first         n,,n=NAME,r=CLIENT-NONCE                   ──▶
                                                             ◀──  server-first   r=BOTH-NONCES,s=SALT,i=ITERATIONS
    final         c=biws,r=BOTH-NONCES,p=PROOF               ──▶
                                                             ◀──  server-final   v=SIGNATURE

RFC 5802 with the hash of RFC 7677, without channel binding. The server stores a `Verifier`, from which the secret
cannot be computed; the client derives its keys from salt and iterations at each login. Both sign all previous messages,
including both nonces, so nothing can be replayed and each learns that the other knows the secret.

Nonces are arguments, so this module needs no randomness. The existing library (scramp) supports more mechanisms, in six
times as many lines without types, and brings an X.509 parser along.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from dataclasses import dataclass, field

from tunneld.errors import NotAllowedError, RemoteProtocolError, UsageError
from tunneld.wire.verifier import (
    DIGEST,
    ITERATION_COUNT,
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
"""The only reason a client is given: an unknown name, a wrong secret and a wrong network look alike."""

_NONCE = re.compile(r"[\x21-\x2b\x2d-\x7e]{1,512}")  # RFC 5802 §7: printable, no comma; the length limit is ours
_NAME_ESCAPE = re.compile(r"=(?P<code>2C|3D)?")


@dataclass(frozen=True, slots=True)
class Hello:
    """The client-first-message (RFC 5802 §7)."""

    header: str  # gs2-header: the client's channel binding flag
    name: str
    nonce: str
    bare: str  # client-first-message-bare, which is signed

    @classmethod
    def parse(cls, message: bytes) -> Hello:
        """Parse the message. Raises `UsageError`."""
        parts = _text(message).split(",", 2)
        if len(parts) != 3 or parts[0] not in {"n", "y"}:
            raise UsageError(f"not a first message of {MECHANISM} without channel binding: it must begin with n,,")
        if parts[1]:
            raise UsageError("an authorization identity (a=) is not supported; leave it out")
        values = _attributes(parts[2], "n", "r")
        return cls(f"{parts[0]},,", _unescape(values["n"]), _nonce(values["r"]), parts[2])


@dataclass(frozen=True, slots=True)
class Challenge:
    """The server's half of one login: answer `hello` with `message`, then pass the client's reply to `accept`."""

    hello: Hello
    verifier: Verifier
    nonce: str  # the server's part; new for each login, or a recorded login could be replayed

    @property
    def message(self) -> bytes:
        """The server-first-message."""
        salt = to_base64(self.verifier.salt)
        return f"r={self.hello.nonce}{self.nonce},s={salt},i={self.verifier.iterations}".encode()

    def accept(self, final: bytes) -> bytes:
        """Verify the client-final-message; returns the server-final-message.

        Raises `UsageError` if it is malformed, `NotAllowedError` if it does not prove knowledge of the secret or
        belongs to another challenge.
        """
        values = _attributes(_text(final), "c", "r", "p")
        proof, binding = from_base64(values["p"], "the proof"), from_base64(values["c"], "the channel binding")
        without_proof = final.rpartition(b",p=")[0]
        signed = b",".join([self.hello.bare.encode(), self.message, without_proof])
        signature = sign(self.verifier.stored_key, signed)
        client_key = _xor(proof.ljust(DIGEST)[:DIGEST], signature)
        is_proven = hmac.compare_digest(hashlib.sha256(client_key).digest(), self.verifier.stored_key)
        is_fresh = hmac.compare_digest(values["r"].encode(), f"{self.hello.nonce}{self.nonce}".encode())
        is_bound = hmac.compare_digest(binding, self.hello.header.encode())
        if not (is_proven and is_fresh and is_bound and len(proof) == DIGEST):
            raise NotAllowedError(FAILED)
        return b"v=" + to_base64(sign(self.verifier.server_key, signed)).encode()


@dataclass(frozen=True, slots=True)
class Proof:
    """The client's answer to a challenge: `message` is sent, `expected` is the server's correct reply."""

    message: bytes
    expected: bytes = field(repr=False)

    def check(self, final: bytes) -> None:
        """Raise `RemoteProtocolError` unless the server-final-message proves that the relay knows the secret."""
        if not hmac.compare_digest(final.split(b",")[0], self.expected):
            raise RemoteProtocolError("it does not know the secret")


@dataclass(frozen=True, slots=True)
class ScramClient:
    """The client's half of one login. `nonce` is new for each login, printable and without commas."""

    name: str
    secret: str = field(repr=False)
    nonce: str

    @property
    def message(self) -> bytes:
        """The client-first-message."""
        return f"n,,{self._bare}".encode()

    def prove(self, challenge: bytes) -> Proof:
        """Answer the server-first-message. Slow by design: call it in a thread.

        Raises `RemoteProtocolError` if it is malformed or demands too few or too many iterations, `UsageError` if the
        secret is not ASCII.
        """
        nonce, salt, iterations = self._parse(challenge)
        client_key, server_key = client_and_server_key(self.secret, salt, iterations)
        without_proof = f"c=biws,r={nonce}".encode()
        signed = b",".join([self._bare.encode(), challenge, without_proof])
        signature = sign(hashlib.sha256(client_key).digest(), signed)
        proof = to_base64(_xor(client_key, signature)).encode()
        return Proof(without_proof + b",p=" + proof, b"v=" + to_base64(sign(server_key, signed)).encode())

    @property
    def _bare(self) -> str:
        name = self.name.replace("=", "=3D").replace(",", "=2C")
        return f"n={name},r={self.nonce}"

    def _parse(self, challenge: bytes) -> tuple[str, bytes, int]:
        try:
            values = _attributes(_text(challenge), "r", "s", "i")
            nonce, salt = _nonce(values["r"]), from_base64(values["s"], "the salt")
        except UsageError as error:
            raise RemoteProtocolError(f"its challenge is not a {MECHANISM} message: {error}") from None
        if not nonce.startswith(self.nonce) or nonce == self.nonce:
            raise RemoteProtocolError("its challenge has another nonce than the login it answers")
        iterations = int(values["i"]) if ITERATION_COUNT.fullmatch(values["i"]) else 0
        if not MIN_ITERATIONS <= iterations <= MAX_ITERATIONS:
            limits = f"not between {MIN_ITERATIONS} and {MAX_ITERATIONS}"
            raise RemoteProtocolError(f"it asks for {values['i'][:20]} iterations, {limits}")
        return nonce, salt, iterations


def encode(message: bytes, *, padded: bool = True) -> str:
    """A message as one word of the control protocol. Without padding it cannot be mistaken for `key=value`."""
    return to_base64(message) if padded else to_base64(message).rstrip("=")


def decode(text: str) -> bytes:
    """The message in one word of the control protocol, padded or not. Raises `UsageError`."""
    return from_base64(text.rstrip("=") + "=" * (-len(text.rstrip("=")) % 4), "the message")


def _xor(one: bytes, other: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(one, other, strict=True))


def _text(message: bytes) -> str:
    try:
        return message.decode()
    except UnicodeDecodeError:
        raise UsageError(f"{MECHANISM} message is not UTF-8") from None


def _attributes(text: str, *wanted: str) -> dict[str, str]:
    """The attributes of a message. The wanted ones come in this order; extensions may stand before `p`, or last."""
    parts = [part.partition("=")[::2] for part in text.split(",")]
    names = [name for name, _ in parts]
    head = list(wanted[:-1]) if wanted[-1] == "p" else list(wanted)
    if names[: len(head)] != head or (wanted[-1] == "p" and names[-1] != "p") or len(set(names)) != len(names):
        raise UsageError(f"{MECHANISM} message does not have the attributes {', '.join(wanted)}, each once")
    return dict(parts)


def _nonce(text: str) -> str:
    if not _NONCE.fullmatch(text):
        raise UsageError("the nonce is empty, too long or not printable")
    return text


def _unescape(name: str) -> str:
    """Decode a saslname: a comma is `=2C`, an equals sign is `=3D` (RFC 5802 §5.1)."""
    if any(match["code"] is None for match in _NAME_ESCAPE.finditer(name)):
        raise UsageError("the name contains an equals sign that does not begin =3D or =2C")
    return name.replace("=2C", ",").replace("=3D", "=")
