"""The laws of every codec: round trip, chunking is invisible, garbage is the peer's fault and never piles up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.codecs import CODECS, Codec, Events, LineDecoder, parse_or_refuse
from tunneld.errors import RemoteProtocolError
from tunneld.wire.lines import MAX_LINE, Request

codecs = pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)


def some_events(codec: Codec) -> st.SearchStrategy[Events]:
    return st.lists(codec.events, min_size=1, max_size=6 if codec.many else 1)


def encode_all(codec: Codec, events: Events) -> bytes:
    return b"".join(map(codec.encode, events))


def cut(data: bytes, sizes: list[int]) -> Iterator[bytes]:
    """`data` in pieces of the given sizes, the last of them repeated."""
    position = 0
    for number in range(len(data)):
        size = sizes[min(number, len(sizes) - 1)]
        if position < len(data):
            yield data[position : position + size]
        position += size


def decode(codec: Codec, pieces: list[bytes]) -> tuple[Events, str | None]:
    """All events and the complaint that ended them, if one did. Memory is checked on the way."""
    decoder = codec.decoder()
    events: Events = []
    try:
        for piece in pieces:
            events += decoder.feed(piece)
            assert decoder.held <= codec.memory
        events += decoder.feed(b"")
    except RemoteProtocolError as error:
        return events, str(error)
    return events, None


piece_sizes = st.lists(st.integers(1, 40), min_size=1, max_size=8)


@codecs
@given(data=st.data())
def test_what_was_encoded_is_decoded(codec: Codec, data: st.DataObject) -> None:
    events = data.draw(some_events(codec))
    assert decode(codec, [encode_all(codec, events)]) == (events, None)


@codecs
@given(data=st.data(), sizes=piece_sizes)
def test_it_does_not_matter_where_the_octets_are_cut(codec: Codec, data: st.DataObject, sizes: list[int]) -> None:
    events = data.draw(some_events(codec))
    assert decode(codec, list(cut(encode_all(codec, events), sizes))) == (events, None)


@codecs
@given(data=st.data(), sizes=piece_sizes, octets=st.binary(max_size=400))
def test_garbage_is_the_peers_fault_however_it_is_cut(
    codec: Codec, data: st.DataObject, sizes: list[int], octets: bytes
) -> None:
    start = encode_all(codec, data.draw(some_events(codec)))
    garbage = start[: data.draw(st.integers(0, len(start)))] + octets
    assert decode(codec, list(cut(garbage, sizes))) == decode(codec, [garbage])


@codecs
@given(data=st.data(), position=st.integers(0), octet=st.integers(0, 255))
def test_one_wrong_octet_is_understood_or_blamed(codec: Codec, data: st.DataObject, position: int, octet: int) -> None:
    good = bytearray(encode_all(codec, data.draw(some_events(codec))))
    good[position % len(good)] = octet
    decode(codec, [bytes(good)])


@codecs
@pytest.mark.parametrize("filler", [b"x", b"\0", b"\r", b'"', b"\xff", b"\\", b"= "])
def test_endless_input_is_refused_in_bounded_memory(codec: Codec, filler: bytes) -> None:
    endless = codec.endless + filler * (2 * codec.memory // len(filler))
    complaint = decode(codec, [endless[position : position + 64] for position in range(0, len(endless), 64)])[1]
    assert complaint is not None
    assert "longer than" in complaint


# Controls: decoders that break a law, to show that the laws bite.


class _ForgetsUnfinishedLines(LineDecoder):
    def feed(self, data: bytes) -> Events:
        return super().feed(data[: data.rfind(b"\n") + 1])


class _Hoards:
    """Waits for a line end, however long that takes."""

    def __init__(self) -> None:
        self._data = b""

    def feed(self, data: bytes) -> Events:
        self._data += data
        *lines, self._data = self._data.split(b"\n")
        return lines

    @property
    def held(self) -> int:
        return len(self._data)


def test_the_law_of_chunking_sees_a_decoder_that_forgets() -> None:
    requests = CODECS[0]
    wrong = replace(requests, decoder=lambda: _ForgetsUnfinishedLines(MAX_LINE, parse_or_refuse))
    octets = encode_all(requests, [Request("list"), Request("show", ("t4",))])
    assert decode(wrong, [octets]) == decode(requests, [octets])
    assert decode(wrong, list(cut(octets, [3]))) != decode(requests, [octets])


def test_the_law_of_memory_sees_a_decoder_that_hoards() -> None:
    wrong = replace(CODECS[0], decoder=_Hoards)
    with pytest.raises(AssertionError):
        decode(wrong, [b"x" * 1000] * 5)
