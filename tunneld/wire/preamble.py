"""The preamble of a visit to a private tunnel: what the two ends send in the clear, before their TLS. Pure.

    VISITOR ──► certificate             ┌───────┬─────────┬────────────┬──────────┐
    certificate, or refusal ◄── HOST    │ "TPV1"│ kind: 1 │ length: 2  │ body     │
    ═══════════ TLS 1.3 ═══════════     └───────┴─────────┴────────────┴──────────┘

Nothing in it is authenticated: the relay could have written it. A certificate is compared with the ids that are
expected and then proved by TLS. A refusal is a hint for the user, and ends the visit.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from tunneld.errors import RemoteProtocolError

MAGIC = b"TPV1"
"""Begins each message: the version of the preamble, and no first byte of TLS, HTTP or SSH."""
LEAVE_TLS = "leave-tls"
"""The last word of the relay's answer to a visitor whose connection may leave its TLS behind the handshake."""
CERTIFICATE, REFUSAL = 1, 2
"""Kinds of messages."""
MAX_CERTIFICATE_BODY = 1024
"""Bytes of a certificate in DER; one with an Ed25519 key and nothing else has some 250."""
MAX_REFUSAL_BODY = 512
"""Bytes of the text of a refusal, in UTF-8."""
_HEADER = struct.Struct("!4sBH")
_MAX_BODY = {CERTIFICATE: MAX_CERTIFICATE_BODY, REFUSAL: MAX_REFUSAL_BODY}
MAX_MESSAGE = _HEADER.size + max(_MAX_BODY.values())
"""Bytes of the longest message."""


@dataclass(frozen=True, slots=True)
class PreambleMessage:
    """One message, and how many bytes it was."""

    kind: int
    body: bytes
    size: int

    @property
    def text(self) -> str:
        """The text of a refusal, in one line. The peer wrote it, so it may claim anything."""
        text = self.body.decode(errors="replace")
        return "".join(char if char.isprintable() else "?" for char in text) or "no reason given"


def parse_preamble(data: bytes) -> PreambleMessage | None:
    """The first message in `data`; None while it is incomplete. Raises `RemoteProtocolError` as soon as it can be no
    valid message.
    """
    if not MAGIC.startswith(data[: len(MAGIC)]):
        raise RemoteProtocolError("the peer does not speak the protocol of private tunnels")
    if len(data) < _HEADER.size:
        if len(data) > len(MAGIC):
            _limit_of(data[len(MAGIC)])
        return None
    _, kind, length = _HEADER.unpack_from(data)
    if length > _limit_of(kind):
        raise RemoteProtocolError(f"message of {length} bytes before TLS, at most {_limit_of(kind)} are accepted")
    size = _HEADER.size + length
    return PreambleMessage(kind, data[_HEADER.size : size], size) if len(data) >= size else None


def encode_certificate(certificate: bytes) -> bytes:
    """The message with a certificate in DER."""
    return _encode(CERTIFICATE, certificate)


def encode_refusal(reason: str) -> bytes:
    """The message with which an end, or the relay, refuses a visit. A long reason is cut."""
    body = reason.encode()[:MAX_REFUSAL_BODY].decode(errors="ignore").encode()
    return _encode(REFUSAL, body)


def _encode(kind: int, body: bytes) -> bytes:
    return _HEADER.pack(MAGIC, kind, len(body)) + body


def _limit_of(kind: int) -> int:
    limit = _MAX_BODY.get(kind)
    if limit is None:
        raise RemoteProtocolError(f"unknown kind of message before TLS: {kind}")
    return limit
