"""The known answers of vectors.txt about the envelope, and that no line of the file is left out."""

from __future__ import annotations

import pytest

from tests.wire.egtp.mesgen.keys import A, B, counted, given, octets
from tests.wire.egtp.test_vectors import VECTORS, starting
from tunneld.wire.egtp.ids import to_sixbit
from tunneld.wire.egtp.mesgen import MesgenSessions, OpenedEnvelope
from tunneld.wire.egtp.mesgen.ciphers import desx_decrypt, desx_encrypt, oaep_decode, oaep_encode, sha1, sha_random
from tunneld.wire.egtp.mesgen.header import make_header, mix, open_header
from tunneld.wire.mencode import decode, encode

RANDOM = [octets(name) for name in starting("A->B header random: ")]
ENVELOPE = octets("A->B type 0 msg")


def test_pseudo_random_octets() -> None:
    expected = octets('SHARandom("0123456789").get(64)')
    assert sha_random(b"0123456789", 64) == expected
    assert [sha_random(b"0123456789", length) for length in range(65)] == [expected[:end] for end in range(65)]
    preimage = VECTORS["SHARandom block0 preimage"].encode()
    assert sha1(preimage) == expected[:20]
    assert encode(decode(preimage)) == preimage


@pytest.mark.parametrize("length", [9, 16, 24])
def test_desx(length: int) -> None:
    key, iv, plaintext = bytes(range(24)), bytes(range(0xA0, 0xA8)), bytes(range(0x30, 0x30 + length))
    expected = octets(f"DESX-CBC-CTS key 00..17 iv a0..a7 pt({length}) 30.. ")
    assert desx_encrypt(key, iv, plaintext) == expected
    assert desx_decrypt(key, iv, expected) == plaintext


def test_oaep() -> None:
    padded = octets('OAEP("secret-key-24-bytes-long",127)')
    assert oaep_encode(b"secret-key-24-bytes-long", octets("OAEP seed")) == padded
    assert oaep_decode(padded) == b"secret-key-24-bytes-long"


def test_mix() -> None:
    expected = octets('_mix_counterparties("A"*20,"B"*20,"C"*20)')
    assert mix(b"A" * 20, b"B" * 20, b"C" * 20) == expected


def test_public_keys() -> None:
    assert encode(A.public.encode()) == VECTORS["pubkey A mencoded"].encode()
    assert (A.node_id, B.node_id) == (octets("id A"), octets("id B"))
    assert to_sixbit(octets("key A n")) in VECTORS["pubkey A mencoded"].encode()


def test_the_header() -> None:
    header, session = make_header(A, B.public, given(RANDOM))
    assert header == octets("A->B header")
    assert len(header) == int(VECTORS["A->B header length"])
    assert session.key == octets("A->B symmetric key")
    opened = open_header(B, header)
    assert (opened.peer, opened.key) == (A.public, session.key)
    assert (opened.receiving_id, opened.sending_id) == (session.sending_id, session.receiving_id)


def test_the_envelope() -> None:
    assert len(ENVELOPE) == int(VECTORS["A->B type 0 length"])
    assert MesgenSessions(B, counted()).open(ENVELOPE) == OpenedEnvelope(A.node_id, b"hello, relay")
    sender = MesgenSessions(A, given([*RANDOM, octets("A->B type 0 msg iv")]))
    assert sender.seal(sender.store_key(B.public), b"hello, relay") == ENVELOPE


def test_no_vector_is_left_out() -> None:
    read = """mencode|mdecode|initial|mojosixbit|id of|its message id|zlib|SHARandom|DESX-CBC-CTS key 00..17 iv a0..a7
        |OAEP|_mix_counterparties|pubkey A mencoded|id A|id B|key A|key B|A->B header|A->B symmetric key|A->B type 0"""
    prefixes = tuple(prefix.strip() for prefix in read.split("|"))
    assert [name for name in VECTORS if not name.startswith(prefixes)] == []
