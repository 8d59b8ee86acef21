"""The header that sets up a session of the classic envelope. Pure.

    header    = recipient id, string(RSA_recipient(0 | OAEP(key))), iv, string(E(key, iv, inner | signature))
    inner     = string(modulus of the sender), rep_a, rep_b, key_seed
    signature = RSA_sender(0 | OAEP(H(key, inner)))
    key       = R(mix(key_seed), 24); the recipient computes it again and compares
    mix(d)    = SHA1(string(sender id), string(recipient id), string(d))

`mix(rep_a)` is the id of the session in messages to the recipient, `mix(rep_b)` in messages to the sender. The sender
in `mix` is always that of the header. Strings have their length in front (XDR); ids, reps, seeds and ivs have a fixed
length and none.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from tunneld.errors import RemoteProtocolError
from tunneld.wire.egtp.ids import ID_OCTETS
from tunneld.wire.egtp.mesgen.ciphers import (
    BLOCK_OCTETS,
    HASH_OCTETS,
    KEY_OCTETS,
    RSA_OCTETS,
    desx_decrypt,
    desx_encrypt,
    keyed_hash,
    oaep_decode,
    oaep_encode,
    sha1,
    sha_random,
)
from tunneld.wire.egtp.mesgen.envelope import EnvelopeError, XdrReader, pack_string
from tunneld.wire.egtp.mesgen.keys import ClassicKey, ClassicPublicKey

RandomOctets: TypeAlias = Callable[[int], bytes]
"""A source of random octets, such as `os.urandom`."""

HEADER_OCTETS = 484


@dataclass(frozen=True, slots=True, repr=False)
class SessionKeys:
    """What both ends of a session know. `peer` is the key of the end that is not this node."""

    peer: ClassicPublicKey
    key: bytes
    sending_id: bytes
    receiving_id: bytes


def mix(sender: bytes, recipient: bytes, octets: bytes) -> bytes:
    """Bind octets to the two nodes of a header."""
    return sha1(pack_string(sender) + pack_string(recipient) + pack_string(octets))


def make_header(own: ClassicKey, peer: ClassicPublicKey, random: RandomOctets) -> tuple[bytes, SessionKeys]:
    """Make a header for a peer, and the session that it sets up."""
    rep_b, rep_a, key_seed = random(ID_OCTETS), random(ID_OCTETS), random(HASH_OCTETS)
    iv, key_padding, signature_padding = random(BLOCK_OCTETS), random(HASH_OCTETS), random(HASH_OCTETS)
    key = sha_random(mix(own.node_id, peer.node_id, key_seed), KEY_OCTETS)
    inner = pack_string(own.public.octets) + rep_a + rep_b + key_seed
    signature = own.apply(b"\0" + oaep_encode(keyed_hash(key, inner), signature_padding))
    encrypted_key = peer.apply(b"\0" + oaep_encode(key, key_padding))
    sealed = desx_encrypt(key, iv, inner + signature)
    header = peer.node_id + pack_string(encrypted_key) + iv + pack_string(sealed)
    to_peer, from_peer = (mix(own.node_id, peer.node_id, rep) for rep in (rep_a, rep_b))
    return header, SessionKeys(peer, key, sending_id=to_peer, receiving_id=from_peer)


def open_header(own: ClassicKey, header: bytes) -> SessionKeys:
    """The session that a header sets up with this node. Raises `EnvelopeError`, without saying which secret was wrong.

    This needs the private key once, about 10 ms.
    """
    reader = XdrReader(header)
    recipient, encrypted_key = reader.fixed(ID_OCTETS), reader.string(RSA_OCTETS)
    iv, sealed = reader.fixed(BLOCK_OCTETS), reader.string(HEADER_OCTETS)
    reader.end()
    if recipient != own.node_id:
        raise EnvelopeError("EGTP envelope is for another node")
    try:
        key = _padded_in(own.apply(encrypted_key))
        inside = XdrReader(desx_decrypt(key, iv, sealed)) if len(key) == KEY_OCTETS else XdrReader(b"")
        sender = ClassicPublicKey(int.from_bytes(inside.string(RSA_OCTETS), "big"))
        rep_a, rep_b, key_seed = (inside.fixed(HASH_OCTETS) for _ in range(3))
        inner, signature = inside.before(), inside.fixed(RSA_OCTETS)
        inside.end()
        signed = _padded_in(sender.apply(signature))
    except RemoteProtocolError:
        raise EnvelopeError("EGTP envelope has an invalid header") from None
    expected = sha_random(mix(sender.node_id, own.node_id, key_seed), KEY_OCTETS)
    valid = hmac.compare_digest(signed, keyed_hash(key, inner)) & hmac.compare_digest(key, expected)
    if not valid:
        raise EnvelopeError("EGTP envelope has an invalid header")
    to_own, from_own = (mix(sender.node_id, own.node_id, rep) for rep in (rep_a, rep_b))
    return SessionKeys(sender, key, sending_id=from_own, receiving_id=to_own)


def _padded_in(number: bytes) -> bytes:
    if number[0] != 0:
        raise EnvelopeError("RSA number does not begin with 0")
    return oaep_decode(number[1:])
