"""Headers: every octet is authenticated, and a header is for one node."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.wire.egtp.mesgen.keys import A, B, counted
from tunneld.wire.egtp.mesgen import EnvelopeError
from tunneld.wire.egtp.mesgen.ciphers import desx_encrypt, keyed_hash, oaep_encode, sha_random
from tunneld.wire.egtp.mesgen.envelope import pack_string
from tunneld.wire.egtp.mesgen.header import HEADER_OCTETS, make_header, mix, open_header
from tunneld.wire.egtp.mesgen.keys import ClassicKey


@cache
def header() -> bytes:
    made = make_header(A, B.public, counted())[0]
    assert len(made) == HEADER_OCTETS
    return made


@given(st.integers(0, HEADER_OCTETS - 1), st.integers(1, 255))
@settings(max_examples=25)
def test_one_wrong_octet_is_noticed(position: int, change: int) -> None:
    wrong = bytearray(header())
    wrong[position] ^= change
    with pytest.raises(EnvelopeError):
        open_header(B, bytes(wrong))


@given(st.binary(max_size=500))
@settings(max_examples=30)
def test_garbage_is_the_peers_fault(garbage: bytes) -> None:
    for data in (garbage, B.node_id + garbage, header()[: len(garbage)]):
        if data != header():
            with pytest.raises(EnvelopeError):
                open_header(B, data)


def test_a_header_is_for_one_node() -> None:
    with pytest.raises(EnvelopeError, match="another node"):
        open_header(A, header())
    readdressed = A.node_id + header()[20:]
    with pytest.raises(EnvelopeError, match="invalid header"):
        open_header(A, readdressed)


def crafted(signer: ClassicKey, *, key: bytes | None = None, key_octets: int = 24, first: bytes = b"\0") -> bytes:
    """A header from A to B as an attacker would make it: signed by another key, or with a key of its choice."""
    reps, seed, iv = b"1" * 40, b"S" * 20, bytes(8)
    chosen = key or sha_random(mix(A.node_id, B.node_id, seed), 24)
    inner = pack_string(A.public.octets) + reps + seed
    signature = signer.apply(first + oaep_encode(keyed_hash(chosen, inner), seed))
    encrypted = B.public.apply(b"\0" + oaep_encode(chosen[:key_octets], seed))
    return B.node_id + pack_string(encrypted) + iv + pack_string(desx_encrypt(chosen, iv, inner + signature))


def test_a_header_made_by_hand_is_accepted() -> None:
    assert open_header(B, crafted(A)).peer == A.public


@pytest.mark.parametrize(
    "forged",
    [
        crafted(B),
        crafted(A, key=b"K" * 24),
        crafted(A, key_octets=23),
        crafted(A, key_octets=0),
        crafted(A, first=b"\1"),
    ],
)
def test_a_wrong_signature_or_a_key_of_free_choice_is_refused(forged: bytes) -> None:
    with pytest.raises(EnvelopeError, match="invalid header"):
        open_header(B, forged)
