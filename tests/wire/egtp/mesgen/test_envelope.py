"""Envelopes as bytes: round trips, canonical XDR, authenticated messages."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tunneld.wire.egtp.mesgen.envelope import (
    AnyEnvelope,
    EnvelopeError,
    HeaderMessage,
    RejectMessage,
    ShortMessage,
    open_message,
    pack_string,
    parse_envelope,
    seal_message,
)

ids = st.binary(min_size=20, max_size=20)
ivs = st.binary(min_size=8, max_size=8)
texts = st.binary(max_size=30)
envelopes = st.one_of(
    st.builds(HeaderMessage, texts, ivs, texts),
    st.builds(ShortMessage, ids, ivs, texts),
    st.builds(RejectMessage, ids, ids),
)
KEY, IV = bytes(range(24)), bytes(8)


@given(envelopes)
def test_what_was_encoded_is_parsed(envelope: AnyEnvelope) -> None:
    assert parse_envelope(envelope.encode()) == envelope


@given(st.binary(max_size=80) | envelopes.map(lambda envelope: envelope.encode()), st.data())
def test_garbage_is_the_peers_fault_and_what_is_parsed_is_canonical(data: bytes, random: st.DataObject) -> None:
    if data:
        position = random.draw(st.integers(0, len(data) - 1))
        data = data[:position] + random.draw(st.binary(max_size=2)) + data[position + 1 :]
    try:
        envelope = parse_envelope(data)
    except EnvelopeError:
        return
    assert envelope.encode() == data


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ("", "ends after 0 bytes"),
        ("00000002", "unknown type 0x2"),
        ("00000202" + "00" * 39, "ends after 43 bytes"),
        ("00000202" + "00" * 41, "1 bytes after its end"),
        ("00000000" + "00000001" + "78000001" + "00" * 12, "padding is not zero"),
        ("00000000" + "ffffffff", "4294967295 bytes where 4194304"),
        ("00000000" + "00400000", "ends after 8 bytes"),
    ],
)
def test_other_octets_are_refused(data: str, problem: str) -> None:
    with pytest.raises(EnvelopeError, match=problem):
        parse_envelope(bytes.fromhex(data))


@given(st.binary(max_size=60))
@example(b"")
def test_a_message_is_sealed_and_opened(message: bytes) -> None:
    assert open_message(KEY, IV, seal_message(KEY, IV, message)) == message


@given(st.binary(max_size=30), st.data())
@settings(max_examples=50)
def test_an_altered_message_is_noticed(message: bytes, data: st.DataObject) -> None:
    sealed = bytearray(seal_message(KEY, IV, message))
    sealed[data.draw(st.integers(0, len(sealed) - 1))] ^= data.draw(st.integers(1, 255))
    cut = bytes(sealed)[: data.draw(st.integers(0, len(sealed)))]
    for wrong in (bytes(sealed), cut):
        with pytest.raises(EnvelopeError, match="altered, or is not of this session"):
            open_message(KEY, IV, wrong)


def test_another_key_or_iv_does_not_open_a_message() -> None:
    sealed = seal_message(KEY, IV, b"hello")
    for key, iv in ((KEY[1:] + b"x", IV), (KEY, b"\1" + IV[1:])):
        with pytest.raises(EnvelopeError, match="altered"):
            open_message(key, iv, sealed)


def test_a_large_message() -> None:
    message = bytes(1 << 20)
    assert open_message(KEY, IV, seal_message(KEY, IV, message)) == message
    assert pack_string(b"abc") == b"\0\0\0\3abc\0"
