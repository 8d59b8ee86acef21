"""The preamble of a visit: every message survives, and nothing else is accepted."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunneld.errors import RemoteProtocolError
from tunneld.wire.preamble import (
    CERTIFICATE,
    MAX_CERTIFICATE_BODY,
    MAX_MESSAGE,
    MAX_REFUSAL_BODY,
    REFUSAL,
    encode_certificate,
    encode_refusal,
    parse_preamble,
)


@given(st.binary(max_size=MAX_CERTIFICATE_BODY), st.binary(max_size=20))
def test_a_certificate_is_read_however_it_is_cut(body: bytes, rest: bytes) -> None:
    sent = encode_certificate(body)
    for size in range(len(sent)):
        assert parse_preamble(sent[:size]) is None
    message = parse_preamble(sent + rest)
    assert message is not None
    assert (message.kind, message.body, message.size) == (CERTIFICATE, body, len(sent))
    assert len(sent) <= MAX_MESSAGE


@given(st.text(max_size=MAX_REFUSAL_BODY))
def test_a_refusal_is_one_line_of_bounded_size(reason: str) -> None:
    message = parse_preamble(encode_refusal(reason))
    assert message is not None
    assert message.kind == REFUSAL
    assert len(message.body) <= MAX_REFUSAL_BODY
    assert message.text.isprintable()
    assert message.text
    if reason.isprintable() and reason and len(reason.encode()) <= MAX_REFUSAL_BODY:
        assert message.text == reason


@given(st.binary(max_size=2 * MAX_MESSAGE))
def test_any_bytes_are_a_message_or_an_error(data: bytes) -> None:
    try:
        message = parse_preamble(data)
    except RemoteProtocolError:
        return
    assert message is not None or len(data) < MAX_MESSAGE


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01",  # TLS
        b"GET ",
        b"TPV2",
        b"TPV1\x00",
        b"TPV1\x03",
        b"TPV1\x01\x04\x01",  # one byte more than a certificate may have
        b"TPV1\x02\x02\x01",  # than a refusal
    ],
)
def test_it_is_refused_as_soon_as_it_is_wrong(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        parse_preamble(data)
