"""Properties of every codec: round trip, chunking does not matter, garbage is the peer's fault, memory is bounded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.codecs import CODECS, Codec, Events, LineDecoder, parse_or_refuse
from tunneld.errors import RemoteProtocolError
from tunneld.wire.lines import MAX_LINE, ControlRequest

codecs = pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)


def event_lists(codec: Codec) -> st.SearchStrategy[Events]:
    return st.lists(codec.events, min_size=1, max_size=6 if codec.many else 1)


def encode_all(codec: Codec, events: Events) -> bytes:
    return b"".join(map(codec.encode, events))


def cut(data: bytes, sizes: list[int]) -> Iterator[bytes]:
    """`data` in pieces of the given sizes; the last size is repeated."""
    position = 0
    for number in range(len(data)):
        size = sizes[min(number, len(sizes) - 1)]
        if position < len(data):
            yield data[position : position + size]
        position += size


def decode(codec: Codec, pieces: list[bytes]) -> tuple[Events, str | None]:
    """All events, and the error that ended them, if any. Also checks the bound of memory."""
    decoder = codec.decoder()
    events: Events = []
    try:
        for piece in pieces:
            events += decoder.feed(piece)
            assert decoder.held <= codec.memory
        events += decoder.feed(b"")
    except RemoteProtocolError as problem:
        return events, str(problem)
    return events, None


piece_sizes = st.lists(st.integers(1, 40), min_size=1, max_size=8)


@codecs
@given(data=st.data())
def test_what_was_encoded_is_decoded(codec: Codec, data: st.DataObject) -> None:
    events = data.draw(event_lists(codec))
    assert decode(codec, [encode_all(codec, events)]) == (events, None)


@codecs
@given(data=st.data(), sizes=piece_sizes)
def test_it_does_not_matter_where_the_input_is_cut(codec: Codec, data: st.DataObject, sizes: list[int]) -> None:
    events = data.draw(event_lists(codec))
    assert decode(codec, list(cut(encode_all(codec, events), sizes))) == (events, None)


@codecs
@given(data=st.data(), sizes=piece_sizes, tail=st.binary(max_size=400))
def test_garbage_is_the_peers_fault_however_it_is_cut(
    codec: Codec, data: st.DataObject, sizes: list[int], tail: bytes
) -> None:
    start = encode_all(codec, data.draw(event_lists(codec)))
    garbage = start[: data.draw(st.integers(0, len(start)))] + tail
    assert decode(codec, list(cut(garbage, sizes))) == decode(codec, [garbage])


@codecs
@given(data=st.data(), position=st.integers(0), byte=st.integers(0, 255))
def test_one_wrong_byte_is_decoded_or_is_an_error_of_the_peer(
    codec: Codec, data: st.DataObject, position: int, byte: int
) -> None:
    good = bytearray(encode_all(codec, data.draw(event_lists(codec))))
    good[position % len(good)] = byte
    decode(codec, [bytes(good)])


@codecs
@pytest.mark.parametrize("filler", [b"x", b"\0", b"\r", b'"', b"\xff", b"\\", b"= "])
def test_endless_input_is_refused_in_bounded_memory(codec: Codec, filler: bytes) -> None:
    endless = codec.endless + filler * (2 * codec.memory // len(filler))
    error = decode(codec, [endless[position : position + 64] for position in range(0, len(endless), 64)])[1]
    assert error is not None
    assert "longer than" in error


# Decoders that break a property, to show that the tests notice.


class _ForgetsUnfinishedLines(LineDecoder):
    def feed(self, data: bytes) -> Events:
        return super().feed(data[: data.rfind(b"\n") + 1])


class _BuffersWithoutLimit:
    """Waits for a line end without a limit."""

    def __init__(self) -> None:
        self._data = b""

    def feed(self, data: bytes) -> Events:
        self._data += data
        *lines, self._data = self._data.split(b"\n")
        return lines

    @property
    def held(self) -> int:
        return len(self._data)


def test_the_chunking_property_notices_a_decoder_that_forgets() -> None:
    requests = CODECS[0]
    wrong = replace(requests, decoder=lambda: _ForgetsUnfinishedLines(MAX_LINE, parse_or_refuse))
    encoded = encode_all(requests, [ControlRequest("list"), ControlRequest("show", ("t4",))])
    assert decode(wrong, [encoded]) == decode(requests, [encoded])
    assert decode(wrong, list(cut(encoded, [3]))) != decode(requests, [encoded])


def test_the_memory_property_notices_a_decoder_that_buffers_without_limit() -> None:
    wrong = replace(CODECS[0], decoder=_BuffersWithoutLimit)
    with pytest.raises(AssertionError):
        decode(wrong, [b"x" * 1000] * 5)
