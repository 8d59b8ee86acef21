"""Ids and mojosixbit: one text for each id, and no other text is accepted."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunneld.errors import RemoteProtocolError
from tunneld.wire.egtp.ids import ID_CHARACTERS, from_sixbit, id_of, id_text, read_id, to_sixbit


@given(st.binary(max_size=70))
def test_octets_as_text_and_back(octets: bytes) -> None:
    assert from_sixbit(to_sixbit(octets)) == octets


@given(st.binary(max_size=12) | st.text("AQgw-_=+/ \n", max_size=12).map(str.encode))
def test_only_canonical_text_is_accepted(text: bytes) -> None:
    try:
        octets = from_sixbit(text)
    except RemoteProtocolError:
        return
    assert to_sixbit(octets) == text


@pytest.mark.parametrize("text", [b"A", b"AB", b"AA==", b"A+A", b"A/A", b"A A", b"AAAA\n", b"AA\xff", b"AAAAA"])
def test_other_text_is_refused(text: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="not canonical mojosixbit"):
        from_sixbit(text)


def test_an_id_is_read_in_either_form() -> None:
    identity = id_of(b"hello")
    assert len(to_sixbit(identity)) == ID_CHARACTERS
    assert read_id(identity) == read_id(to_sixbit(identity)) == identity
    assert id_text(identity) == "qvTGHdzF6KLavt4PO0gs2a6pQ00"


@pytest.mark.parametrize("value", [None, 5, b"", bytes(19), bytes(21), b"A" * 26, b"A" * 26 + b"B", b"=" * 27])
def test_anything_else_is_no_id(value: object) -> None:
    with pytest.raises(RemoteProtocolError, match=r"not an id|not canonical"):
        read_id(value)
