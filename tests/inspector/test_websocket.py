"""Frames, masks, and permessage-deflate."""

from __future__ import annotations

import zlib

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.inspector.support import Recorded
from tunneld.inspector.settings import InspectorLimits
from tunneld.inspector.store import ExchangeStore
from tunneld.inspector.websocket import Inflater, keeps_context

UPGRADE = b"GET /ws HTTP/1.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
SWITCHED = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n%b\r\n"
DEFLATE = b"Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits=15\r\n"
MASK = b"\x01\x02\x03\x04"


def frame(opcode: int, data: bytes, *, is_final: bool = True, is_masked: bool = False, rsv1: bool = False) -> bytes:
    first = opcode | (0x80 if is_final else 0) | (0x40 if rsv1 else 0)
    size = len(data)
    if size < 126:
        head = bytes((first, size))
    elif size < 65536:
        head = bytes((first, 126)) + size.to_bytes(2, "big")
    else:
        head = bytes((first, 127)) + size.to_bytes(8, "big")
    if not is_masked:
        return head + data
    masked = bytes(byte ^ MASK[index % 4] for index, byte in enumerate(data))
    return bytes((head[0], head[1] | 0x80)) + head[2:] + MASK + masked


def opened(extensions: bytes = b"", limits: InspectorLimits | None = None) -> Recorded:
    made = Recorded(ExchangeStore(limits or InspectorLimits()))
    made.ask(UPGRADE)
    made.reply(SWITCHED % extensions)
    return made


def deflated(compressor: zlib._Compress, data: bytes) -> bytes:
    return (compressor.compress(data) + compressor.flush(zlib.Z_SYNC_FLUSH)).removesuffix(b"\x00\x00\xff\xff")


@given(st.integers(1, 30), st.lists(st.binary(max_size=200), max_size=5))
@settings(max_examples=60, deadline=None)
def test_frames_in_any_pieces(chunk: int, messages: list[bytes]) -> None:
    made = opened()
    made.ask(b"".join(frame(2, data, is_masked=True) for data in messages), chunk)
    made.reply(frame(9, b"") + frame(1, "ä".encode()), chunk)
    made.end()
    seen = [(one.is_request, one.opcode, one.data, one.size) for one in made.one.frames]
    assert seen == [(True, 2, data, len(data)) for data in messages] + [(False, 9, b"", 0), (False, 1, b"\xc3\xa4", 2)]
    assert made.one.note == ""


def test_compressed_messages_are_decompressed() -> None:
    made = opened(DEFLATE)
    compressor = zlib.compressobj(wbits=-15)
    first, second = deflated(compressor, b"hello hello"), deflated(compressor, b"hello hello again")
    made.reply(frame(1, first, rsv1=True))
    made.reply(frame(1, second[:3], is_final=False, rsv1=True) + frame(9, b"now") + frame(0, second[3:]))
    whole, *rest = made.one.frames
    assert whole.data == b"hello hello"
    assert b"".join(one.data for one in rest if one.opcode != 9) == b"hello hello again"
    assert not any(one.compressed for one in made.one.frames)


def test_a_bomb_is_cut_and_what_follows_is_said_to_be_compressed() -> None:
    made = opened(DEFLATE, InspectorLimits(body=1000))
    compressor = zlib.compressobj(wbits=-15)
    made.reply(frame(1, deflated(compressor, bytes(100_000)), rsv1=True))
    made.reply(frame(1, deflated(compressor, b"after"), rsv1=True))
    bomb, after = made.one.frames
    assert (len(bomb.data), bomb.compressed) == (1000, False)
    assert after.compressed


def test_without_context_takeover_the_next_message_is_readable_again() -> None:
    inflater = Inflater(1000, keeps_context=False)
    assert inflater.inflate(b"\xff\xff", is_final=True, is_whole=True) is None
    data = deflated(zlib.compressobj(wbits=-15), b"after")
    assert inflater.inflate(data, is_final=True, is_whole=True) == b"after"
    assert keeps_context("permessage-deflate; server_no_context_takeover", "server") is False
    assert keeps_context("permessage-deflate; server_no_context_takeover", "client") is True
    assert keeps_context("x-other", "client") is None


def test_a_bounded_number_of_streams_is_decompressed() -> None:
    store = ExchangeStore(InspectorLimits(inflaters=3))
    made = []
    for _ in range(2):
        one = Recorded(store)
        one.ask(UPGRADE)
        one.reply(SWITCHED % DEFLATE)
        made.append(one)
    assert store.inflaters == 3
    for one in made:
        one.end()
    assert store.inflaters == 0


def test_large_frames_are_kept_in_part_and_old_ones_go() -> None:
    made = opened(limits=InspectorLimits(body=100, frames=5))
    made.reply(frame(2, bytes(70_000)))
    assert [(len(one.data), one.size) for one in made.one.frames] == [(100, 70_000)]
    for number in range(9):
        made.reply(frame(1, b"%d" % number))
    assert [one.data for one in made.one.frames] == [b"4", b"5", b"6", b"7", b"8"]
    assert made.one.frames_seen == 10


def test_what_follows_a_refused_upgrade_is_a_request() -> None:
    made = Recorded()
    made.ask(UPGRADE + b"GET /next HTTP/1.1\r\n\r\n")
    made.reply(b"HTTP/1.1 400 Bad\r\nContent-Length: 0\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    assert [exchange.request and exchange.request.target for exchange in made.all] == ["/ws", "/next"]
    assert [exchange.upgrade for exchange in made.all] == ["", ""]
    assert all(exchange.ended for exchange in made.all)


def test_another_protocol_is_only_counted() -> None:
    made = Recorded()
    made.ask(b"CONNECT db:5432 HTTP/1.1\r\n\r\n")
    made.reply(b"HTTP/1.1 200 OK\r\n\r\n\x00\x01")
    made.ask(b"\x16\x03\x01")
    made.end()
    exchange = made.one
    assert exchange.request is not None
    assert exchange.response is not None
    assert (exchange.upgrade, exchange.request.size, exchange.response.size) == ("CONNECT", 3, 2)
    assert exchange.ended is not None
