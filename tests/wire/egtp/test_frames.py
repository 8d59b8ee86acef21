"""Frames of EGTP; tests/wire/test_codecs.py has the properties that all codecs have."""

from __future__ import annotations

import pytest

from tunneld.errors import LocalProtocolError, RemoteProtocolError
from tunneld.wire.egtp.frames import MAX_MESSAGE, FrameReader, pack_frame


def test_the_largest_message_is_sent_and_received() -> None:
    largest = bytes(MAX_MESSAGE)
    reader = FrameReader()
    reader.feed(pack_frame(largest) + b"\0")
    assert reader.next_message() == largest
    assert reader.next_message() is None
    assert len(reader) == 1


def test_a_larger_message_is_refused_by_both_sides() -> None:
    with pytest.raises(LocalProtocolError, match="4194305 bytes is larger than 4194304"):
        pack_frame(bytes(MAX_MESSAGE + 1))
    reader = FrameReader()
    reader.feed(b"\0\x40\0\x01")  # nothing of the message yet
    for _ in range(2):
        with pytest.raises(RemoteProtocolError, match="4194305 bytes is longer than 4194304"):
            reader.next_message()


def test_the_limit_may_be_raised_after_authentication() -> None:
    reader = FrameReader(limit=8)
    reader.feed(pack_frame(b"12345678") + pack_frame(b"123456789"))
    assert reader.next_message() == b"12345678"
    reader.limit = 9
    assert reader.next_message() == b"123456789"


def test_an_announced_length_takes_no_memory() -> None:
    reader = FrameReader()
    reader.feed(b"\0\x40\0\0" + b"x" * 100)
    assert reader.next_message() is None
    assert len(reader) == 104


def test_an_empty_message_is_a_message() -> None:
    reader = FrameReader()
    reader.feed(pack_frame(b"") * 2)
    assert [reader.next_message() for _ in range(3)] == [b"", b"", None]
