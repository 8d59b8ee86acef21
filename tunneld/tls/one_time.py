"""One-time codes: with one, a person without a key gets into a private tunnel, once.

    K7QF-2M9D-X03A-TT4R-8WNH          100 random bits, in letters and digits that are not mistaken for each other

Both ends derive the same three values from the code with HKDF (RFC 5869): a key for each of them, and the ticket by
which the relay finds the tunnel. So the handshake is that of any private tunnel, with two keys that nothing else uses.
The relay learns the ticket and the public keys, from which it cannot find the code: that would take 2^100 steps.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from functools import cached_property

from tunneld.errors import UsageError
from tunneld.net.node_id import NodeId
from tunneld.tls.identity import Identity

ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
"""Crockford's base 32: without I, L, O and U."""
LENGTH = 20
"""Characters of a code, 5 bits each."""
GROUP = 4
"""Characters between two dashes."""
SALT = b"tunneld invitation v1"
_READ_AS = str.maketrans("ILO", "110", "- ")


@dataclass(frozen=True)
class OneTimeCode:
    """A code; `str` prints it in groups."""

    symbols: str = field(repr=False)

    @classmethod
    def create(cls) -> OneTimeCode:
        """A new code."""
        return cls("".join(secrets.choice(ALPHABET) for _ in range(LENGTH)))

    @classmethod
    def parse(cls, text: str) -> OneTimeCode:
        """Read a code as a person types it: in any case, with or without dashes. Raises `UsageError`."""
        symbols = text.upper().translate(_READ_AS)
        if len(symbols) != LENGTH or not set(symbols) <= set(ALPHABET):
            raise UsageError(
                f"not a code of {LENGTH} letters and digits, such as K7QF-2M9D-X03A-TT4R-8WNH, as `tunnel invite` "
                "prints it"
            )
        return cls(symbols)

    @property
    def host_seed(self) -> bytes:
        """The private key of `host`."""
        return self._derive(b"host")

    @cached_property
    def host(self) -> Identity:
        """The key of the end that exposes the tunnel."""
        return Identity.from_seed(self.host_seed)

    @cached_property
    def visitor(self) -> Identity:
        """The key of the visitor."""
        return Identity.from_seed(self._derive(b"visitor"))

    @property
    def ticket(self) -> str:
        """What the visitor shows to the relay: the text of 20 bytes, as that of an id."""
        return str(NodeId(self._derive(b"ticket")[:20]))

    def _derive(self, what: bytes) -> bytes:
        from cryptography.hazmat.primitives import hashes  # noqa: PLC0415  # slow to import, and few need it
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF  # noqa: PLC0415

        return HKDF(hashes.SHA256(), 32, SALT, what).derive(self.symbols.encode())

    def __str__(self) -> str:
        return "-".join(self.symbols[at : at + GROUP] for at in range(0, LENGTH, GROUP))
