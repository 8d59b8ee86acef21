"""Private tunnels: how an agent claims the id of its node, and which credential may ask for which tunnel. Pure.

    private=KEY.SIGNATURE        an option of openTunnel: an Ed25519 public key, and its signature of `claimed_text`

The relay must not let one credential take the id of another user's node, or that user could not be reached. The
signature shows that the agent holds the key. It is the same each time, so that the agent can open the tunnel again
without another round trip; that does no harm, because it is good for one credential and one name only, and serves
nothing but to have the address: visitors check the key themselves.
"""

from __future__ import annotations

import re
from base64 import urlsafe_b64decode, urlsafe_b64encode
from binascii import Error
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from tunneld.errors import NotAllowedError, UsageError
from tunneld.net.address import Private
from tunneld.net.node_id import ED25519_KEY_BYTES, NodeId

if TYPE_CHECKING:
    from tunneld.policy.access import Grant
    from tunneld.policy.options import TunnelOptions

CONTEXT = b"tunneld private tunnel v1"
"""Begins every signed text, so that a signature means nothing elsewhere."""
_PEER = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}", re.ASCII)
SIGNATURE_BYTES = 64
"""Size of an Ed25519 signature."""


@dataclass(frozen=True, slots=True)
class PrivateClaim:
    """A public key and its signature: `claimed_text` of the credential and the tunnel."""

    public_key: bytes
    signature: bytes

    @classmethod
    def parse(cls, text: str) -> PrivateClaim:
        """Parse what `str` prints. Raises `ValueError`."""
        key, _, signature = text.partition(".")
        claim = cls(_decode(key), _decode(signature))
        if len(claim.public_key) != ED25519_KEY_BYTES or len(claim.signature) != SIGNATURE_BYTES:
            raise ValueError("not an Ed25519 public key and a signature")
        return claim

    @property
    def node(self) -> NodeId:
        """The id of the node that it claims."""
        return NodeId.of_key(self.public_key)

    def __str__(self) -> str:
        return f"{_encode(self.public_key)}.{_encode(self.signature)}"


def parse_peer(text: str) -> str:
    """Check the form of a peer's name or id. Raises `ValueError`."""
    if not _PEER.fullmatch(text):
        raise ValueError("not the name or the id of a peer, see `tunnel trust`")
    return text


def claimed_text(credential: str, name: str) -> bytes:
    """What the agent signs: with which credential it opens the tunnel, and the tunnel's name."""
    return b"\0".join((CONTEXT, credential.encode(), name.encode()))


def check_private_options(options: TunnelOptions) -> None:
    """Raise `UsageError` where options of a private tunnel contradict each other."""
    if options.private is None:
        return
    if not options.name:
        raise UsageError("a private tunnel requires a name, by which its visitors ask for it; add name")
    if not options.persist:
        raise UsageError("a private tunnel requires persist=yes")
    for key in ("host", "client_port", "auth", "forward_auth", "hsts", "host_header"):
        if getattr(options, key) not in {None, "", (), 0}:
            raise UsageError(f"option {key} is for public tunnels; leave it out, or leave out private")


def check_visit(grant: Grant, address: Private) -> None:
    """Raise `NotAllowedError` where a credential may not ask for a private tunnel. The patterns of its `visit` are
    `NAME@ID` with `*` for any part; without any, it may ask for all.
    """
    if not may_visit(grant.visit, address):
        assert grant.visit is not None
        allowed = f"only {', '.join(grant.visit)}" if grant.visit else "and no other private tunnel"
        raise NotAllowedError(f"{grant.title} may not visit {address}, {allowed}; ask the relay's operator (visit)")


def may_visit(patterns: Sequence[str] | None, address: Private) -> bool:
    """Whether one of the patterns fits."""
    return patterns is None or any(fnmatchcase(str(address), pattern) for pattern in patterns)


def _encode(data: bytes) -> str:
    return urlsafe_b64encode(data).decode().rstrip("=")


def _decode(text: str) -> bytes:
    """Raises `ValueError`, also for a text that `_encode` would not print."""
    try:
        data = urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except Error as error:
        raise ValueError(f"not base64: {error}") from None
    if _encode(data) != text:
        raise ValueError("not base64 as RFC 4648 §5 has it, without padding")
    return data
