"""The modern envelope: its forms, and everything that is none of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunneld.errors import RemoteProtocolError
from tunneld.wire.egtp.envelope import (
    HelloEnvelope,
    RecordsEnvelope,
    RejectEnvelope,
    decode_envelope,
    decode_streams,
    encode_hello,
    encode_records,
    encode_reject,
    encode_streams,
    type_of,
)

A, B = b"A" * 20, b"B" * 20
NUMBERS = st.integers(0, (1 << 64) - 1)


@given(text=st.binary(max_size=100))
def test_hellos_and_rejections(text: bytes) -> None:
    assert decode_envelope(memoryview(encode_hello(A, B, text))) == HelloEnvelope(A, B, text)
    reason = text.decode(errors="replace")[:50]
    assert decode_envelope(memoryview(encode_reject(A, B, reason))) == RejectEnvelope(A, B, reason)


@given(number=NUMBERS, records=st.binary(max_size=100))
def test_records(number: int, records: bytes) -> None:
    envelope = encode_records(A, number, records)
    assert len(envelope) % 4 == 0
    assert decode_envelope(memoryview(envelope)) == RecordsEnvelope(A, number, memoryview(records))


@given(number=NUMBERS, frames=st.binary(max_size=100))
def test_streams(number: int, frames: bytes) -> None:
    found = decode_streams(memoryview(encode_streams(number, frames)))
    assert (found[0], bytes(found[1])) == (number, frames)


@pytest.mark.parametrize(
    "envelope",
    [
        b"",
        b"\0\0\3",
        b"\0\0\3\x04" + bytes(60),
        encode_hello(A, B, b"certificate")[:-1],
        encode_hello(A, B, b"certificate") + bytes(4),
        encode_hello(A, B, b"certificate")[:-1] + b"x",
        encode_records(A, 0, b"records")[:20],
        encode_streams(0, b""),
    ],
    ids=["empty", "no type", "unknown", "cut", "more", "padding", "short", "streams outside of a session"],
)
def test_what_is_no_envelope(envelope: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        decode_envelope(memoryview(envelope))


def test_only_streams_are_streams() -> None:
    for envelope in (encode_reject(A, B, ""), b"\0\0\3\3\0", b""):
        with pytest.raises(RemoteProtocolError):
            decode_streams(memoryview(envelope))


@given(st.binary(max_size=120))
def test_any_octets_are_an_envelope_or_an_error(octets: bytes) -> None:
    try:
        found = decode_envelope(memoryview(octets))
    except RemoteProtocolError:
        return
    assert type_of(octets) in {0x300, 0x301, 0x302}
    assert found is not None
