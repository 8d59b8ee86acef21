"""Compression: bounded inflation, and messages that are not compressed."""

from __future__ import annotations

import tracemalloc
import zlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunneld.errors import RemoteProtocolError
from tunneld.wire.egtp.frames import MAX_MESSAGE
from tunneld.wire.egtp.packing import deflate, inflate
from tunneld.wire.mencode import encode


@given(st.binary(max_size=300))
def test_what_was_deflated_is_inflated(message: bytes) -> None:
    assert inflate(deflate(message)) == message


@given(st.binary(max_size=60))
def test_garbage_is_used_as_it_is(message: bytes) -> None:
    assert inflate(b"\0" + message) == b"\0" + message


@pytest.mark.parametrize("value", [None, 1, b"x", [], {}])
def test_a_mencoded_message_is_used_as_it_is(value: Any) -> None:
    assert inflate(encode(value)) == encode(value)


def test_a_cut_message_is_used_as_it_is_and_a_tail_is_ignored() -> None:
    packed = deflate(b"hello" * 100)
    assert inflate(packed[:-1]) == packed[:-1]
    assert inflate(b"") == b""
    assert inflate(packed + b"tail") == b"hello" * 100


def test_inflation_stops_at_4_mib() -> None:
    assert len(inflate(deflate(bytes(MAX_MESSAGE)))) == MAX_MESSAGE
    with pytest.raises(RemoteProtocolError, match="larger than 4194304 bytes after"):
        inflate(deflate(bytes(MAX_MESSAGE + 1)))
    with pytest.raises(RemoteProtocolError, match="larger than 100 bytes"):
        inflate(deflate(bytes(10**7)), limit=100)


def test_a_bomb_takes_little_memory() -> None:
    bomb = deflate(bytes(1 << 25))
    tracemalloc.start()
    try:
        with pytest.raises(RemoteProtocolError, match="larger than 1000 bytes"):
            inflate(bomb, limit=1000)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_the_level_is_that_of_the_original() -> None:
    assert deflate(b"x")[:2].hex() == "785e"
    assert deflate(b"hello" * 100) == zlib.compress(b"hello" * 100, 3)
