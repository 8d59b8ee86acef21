"""Classic keys: one encoding, made and loaded."""

from __future__ import annotations

from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from tests.wire.egtp.mesgen.keys import A, B
from tunneld.errors import LocalProtocolError, RemoteProtocolError
from tunneld.wire.egtp.ids import to_sixbit
from tunneld.wire.egtp.mesgen.keys import ClassicKey, ClassicPublicKey, load_key, new_key, parse_public_key
from tunneld.wire.mencode import decode, encode


def test_a_public_key_is_parsed() -> None:
    assert parse_public_key(decode(encode(A.public.encode()))) == A.public


def changed(place: bytes, key: bytes, value: Any) -> Any:
    fields: Any = decode(encode(A.public.encode()))
    fields[place][key] = value
    return fields


@pytest.mark.parametrize(
    "value",
    [
        None,
        {},
        changed(b"key values", b"public modulus", b"x"),
        changed(b"key values", b"public modulus", to_sixbit(bytes(128))),
        changed(b"key values", b"public modulus", to_sixbit(b"\xff" * 127 + b"\xfe")),
        changed(b"key values", b"public modulus", to_sixbit(b"\0" + A.public.octets)),
        changed(b"key values", b"public modulus", to_sixbit(b"\1" + A.public.octets)),
        changed(b"key values", b"public exponent", b"17"),
        changed(b"key values", b"public exponent", 3),
        changed(b"key header", b"usage", b"everything"),
        changed(b"key header", b"colour", b"red"),
    ],
)
def test_a_key_has_one_encoding(value: Any) -> None:
    with pytest.raises(RemoteProtocolError):
        parse_public_key(value)


def test_an_exponent_belongs_to_its_modulus() -> None:
    with pytest.raises(LocalProtocolError, match="does not belong"):
        ClassicKey(A.public, B.exponent)
    with pytest.raises(LocalProtocolError, match="does not belong"):
        ClassicKey(A.public, 0)


def test_a_new_key_is_loaded_from_its_file() -> None:
    made, pem = new_key()
    assert load_key(pem).node_id == made.node_id
    assert repr(made).startswith("<")  # nothing of the key


def test_other_files_are_refused() -> None:
    other = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    for pem, problem in ((b"x", "not a private key in PEM"), (other, "an RSA key of 1024 bits")):
        with pytest.raises(LocalProtocolError, match=problem):
            load_key(pem)


def test_a_modulus_is_odd_and_has_1024_bits() -> None:
    for modulus in (2**1023, 2**1024 + 1, 2**1022 + 1, 3):
        with pytest.raises(RemoteProtocolError, match="1024 bits"):
            ClassicPublicKey(modulus)
