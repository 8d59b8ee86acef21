"""The algorithms of the classic envelope, against slower forms of themselves."""

from __future__ import annotations

import pytest
from cryptography.hazmat.decrepit.ciphers.algorithms import TripleDES
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.modes import ECB
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.wire.egtp.mesgen.keys import A
from tunneld.errors import LocalProtocolError, RemoteProtocolError
from tunneld.wire.egtp.mesgen.ciphers import (
    PADDED_OCTETS,
    desx_decrypt,
    desx_encrypt,
    keyed_hash,
    oaep_decode,
    oaep_encode,
    rsa_private,
    rsa_public,
    sha1,
    sha_random,
    xor,
)

keys = st.binary(min_size=24, max_size=24)
ivs = st.binary(min_size=8, max_size=8)


def desx_by_blocks(key: bytes, iv: bytes, plaintext: bytes) -> bytes:
    """DESX as its definition says, block by block."""
    des = Cipher(TripleDES(key[8:16] * 3), ECB()).encryptor()
    previous, blocks = iv, []
    for at in range(0, len(plaintext), 8):
        block = plaintext[at : at + 8].ljust(8, b"\0")
        previous = xor(key[16:], des.update(xor(key[:8], xor(block, previous))))
        blocks.append(previous)
    blocks[-2:] = [blocks[-1], blocks[-2]]
    return b"".join(blocks)[: len(plaintext)]


@given(keys, ivs, st.binary(min_size=9, max_size=70))
@settings(max_examples=60)
def test_desx_of_any_length(key: bytes, iv: bytes, plaintext: bytes) -> None:
    ciphertext = desx_encrypt(key, iv, plaintext)
    assert ciphertext == desx_by_blocks(key, iv, plaintext)
    assert desx_decrypt(key, iv, ciphertext) == plaintext


@pytest.mark.parametrize("length", [0, 1, 8])
def test_desx_needs_more_than_a_block(length: int) -> None:
    with pytest.raises(LocalProtocolError, match="more than 8"):
        desx_encrypt(bytes(24), bytes(8), bytes(length))
    with pytest.raises(RemoteProtocolError, match="no more than 8"):
        desx_decrypt(bytes(24), bytes(8), bytes(length))


@given(st.binary(max_size=PADDED_OCTETS - 41), st.binary(min_size=20, max_size=20))
@settings(max_examples=30)
def test_oaep_of_any_length(message: bytes, seed: bytes) -> None:
    padded = oaep_encode(message, seed)
    assert len(padded) == PADDED_OCTETS
    assert oaep_decode(padded) == message


@given(st.binary(max_size=140))
@settings(max_examples=40)
def test_other_padding_is_the_peers_fault(padded: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="padding is wrong"):
        oaep_decode(padded)


def test_padding_with_a_wrong_separator_or_none_or_another_label_is_refused() -> None:
    seed = bytes(20)
    for label, rest in ((b"", b"\2x"), (b"", b""), (b"another", b"\1x")):
        block = sha1(label) + rest.rjust(PADDED_OCTETS - 40, b"\0")
        masked = xor(block, sha_random(seed, len(block)))
        with pytest.raises(RemoteProtocolError, match="padding is wrong"):
            oaep_decode(xor(seed, sha_random(masked, 20)) + masked)


def test_what_does_not_fit_is_not_padded() -> None:
    with pytest.raises(LocalProtocolError, match="does not fit"):
        oaep_encode(bytes(PADDED_OCTETS - 40), bytes(20))
    with pytest.raises(LocalProtocolError, match="does not fit"):
        oaep_encode(b"", bytes(19))


def test_the_mac_depends_on_the_key_and_the_message() -> None:
    assert keyed_hash(b"k", b"m") == sha1(b"m" + sha1(b"km"))
    assert len({keyed_hash(key, message) for key in (b"k", b"l") for message in (b"m", b"n")}) == 4


@given(st.integers(0, A.public.modulus - 1))
@settings(max_examples=10)
def test_rsa_and_back(number: int) -> None:
    octets = number.to_bytes(128, "big")
    assert rsa_private(A.public.modulus, A.exponent, octets) == pow(number, A.exponent, A.public.modulus).to_bytes(
        128, "big"
    )
    assert A.public.apply(A.apply(octets)) == octets


@pytest.mark.parametrize("number", [A.public.octets, b"\xff" * 128, bytes(127), bytes(129)])
def test_numbers_beyond_the_modulus_are_refused(number: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="not below the modulus"):
        rsa_public(A.public.modulus, number)
    with pytest.raises(RemoteProtocolError, match="not below the modulus"):
        A.apply(number)
