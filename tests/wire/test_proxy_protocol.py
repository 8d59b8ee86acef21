"""PROXY protocol headers, byte by byte as in the specification."""

from __future__ import annotations

import pytest

from tunneld.errors import LocalProtocolError, RemoteProtocolError
from tunneld.wire.proxy_protocol import (
    COMMON_V2,
    MAX_V1,
    MAX_V2,
    MIN_V2,
    SIGNATURE,
    Address,
    ProxyHeader,
    decode_v1,
    decode_v2,
    encode_v1,
    encode_v2,
    missing_v2,
)

VISITOR = ("192.0.2.1", 51234)
PUBLIC = ("198.51.100.7", 443)
VISITOR_6 = ("2001:db8::1", 51234)
PUBLIC_6 = ("2001:db8::7", 443)


def test_version_2_for_ipv4_has_28_bytes_as_specified() -> None:
    assert encode_v2(VISITOR, PUBLIC) == bytes.fromhex(
        "0d0a0d0a000d0a515549540a 21 11 000c c0000201 c6336407 c822 01bb"
    )


def test_version_2_for_ipv6_has_52_bytes_as_specified() -> None:
    address = "20010db8000000000000000000000001 20010db8000000000000000000000007"
    assert encode_v2(VISITOR_6, PUBLIC_6) == bytes.fromhex(f"0d0a0d0a000d0a515549540a 21 21 0024 {address} c822 01bb")


def test_version_1_is_a_line_as_specified() -> None:
    assert encode_v1(VISITOR, PUBLIC) == b"PROXY TCP4 192.0.2.1 198.51.100.7 51234 443\r\n"
    assert encode_v1(VISITOR_6, PUBLIC_6) == b"PROXY TCP6 2001:db8::1 2001:db8::7 51234 443\r\n"


@pytest.mark.parametrize(
    ("source", "destination"), [(None, PUBLIC), (VISITOR, None), (VISITOR, PUBLIC_6), (None, None)]
)
def test_without_a_common_family_no_address_is_sent(source: Address | None, destination: Address | None) -> None:
    assert encode_v1(source, destination) == b"PROXY UNKNOWN\r\n"
    header = encode_v2(source, destination)
    assert decode_v2(header + b"hello") == (ProxyHeader(), len(header))
    assert header[12:14] == b"\x20\x00"  # version 2, LOCAL; unspecified family


def test_a_receiver_may_read_28_bytes_before_it_knows_the_length() -> None:
    assert len(encode_v2(VISITOR, PUBLIC)) == len(encode_v2(None, None)) == COMMON_V2
    assert missing_v2(b"") == COMMON_V2
    assert missing_v2(encode_v2(VISITOR, PUBLIC)) == 0
    assert missing_v2(encode_v2(VISITOR_6, PUBLIC_6)[:COMMON_V2]) == 24


def test_link_local_addresses_lose_their_interface() -> None:
    assert decode_v2(encode_v2(("fe80::1%lo", 1), PUBLIC_6)) == (ProxyHeader(("fe80::1", 1), PUBLIC_6), 52)


def test_what_follows_the_header_is_not_part_of_it() -> None:
    for header in (encode_v2(VISITOR, PUBLIC), encode_v2(VISITOR_6, PUBLIC_6)):
        decoded = decode_v2(header + b"GET / HTTP/1.1")
        assert decoded is not None
        assert decoded[1] == len(header)


@pytest.mark.parametrize(
    ("kind", "block"),
    [
        ("21 11", bytes(12) + b"\x04\x00\x01x"),  # TLVs after the addresses
        ("20 00", b""),  # LOCAL of 16 bytes, as other senders encode it
        ("20 11", b"short"),  # LOCAL: the block is ignored
        ("21 00", b"tlv"),  # PROXY of an unspecified family
        ("21 31", bytes(216)),  # unix
        ("21 12", bytes(12)),  # a datagram
    ],
)
def test_headers_of_other_senders_are_decoded(kind: str, block: bytes) -> None:
    header = SIGNATURE + bytes.fromhex(kind) + len(block).to_bytes(2) + block
    decoded = decode_v2(header + b"payload")
    assert decoded is not None
    assert decoded[1] == len(header)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"GET / HTTP/1.1", "does not begin with the signature"),
        (SIGNATURE[:11] + b"\x0b", "does not begin with the signature"),
        (SIGNATURE + b"\x11\x11\x00\x0c" + bytes(12), "unknown version or command: 0x11"),
        (SIGNATURE + b"\x22\x11\x00\x0c" + bytes(12), "unknown version or command: 0x22"),
        (SIGNATURE + b"\x21\x41\x00\x0c" + bytes(12), "unknown family or transport: 0x41"),
        (SIGNATURE + b"\x21\x13\x00\x0c" + bytes(12), "unknown family or transport: 0x13"),
        (SIGNATURE + b"\x21\x11\x00\x0b" + bytes(11), "too short for its addresses"),
        (SIGNATURE + b"\x21\x21\x00\x0c" + bytes(12), "too short for its addresses"),
        (SIGNATURE + b"\x21\x11\xff\xff", f"longer than {MAX_V2}"),
    ],
)
def test_malformed_headers_of_version_2_are_refused(header: bytes, message: str) -> None:
    with pytest.raises(RemoteProtocolError, match=message):
        decode_v2(header)


@pytest.mark.parametrize(
    "line",
    [
        b"PROXZ TCP4",
        b"GET / HTTP/1.1\r\n",
        b"PROXY TCP4 192.0.2.1 198.51.100.7 51234\r\n",
        b"PROXY TCP4 192.0.2.1 198.51.100.7 51234 65536\r\n",
        b"PROXY TCP4 192.0.2.1 198.51.100.7 51234 0443\r\n",
        b"PROXY TCP4 192.0.2.1 198.51.100.7 51234 +443\r\n",
        b"PROXY TCP4 192.0.2.01 198.51.100.7 51234 443\r\n",
        b"PROXY TCP4 2001:db8::1 2001:db8::7 51234 443\r\n",
        b"PROXY TCP6 192.0.2.1 198.51.100.7 51234 443\r\n",
        b"PROXY TCP4  192.0.2.1 198.51.100.7 51234 443\r\n",
        b"PROXY UDP4 192.0.2.1 198.51.100.7 51234 443\r\n",
        b"PROXY TCP4 \xff 198.51.100.7 51234 443\r\n",
        b"PROXY UNKNOWN " + b"x" * MAX_V1,
    ],
)
def test_malformed_lines_of_version_1_are_refused(line: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        decode_v1(line)


def test_unknown_has_no_addresses_whatever_follows() -> None:
    assert decode_v1(b"PROXY UNKNOWN ffff::1 whatever\r\nhello") == (ProxyHeader(), 32)


def test_the_longest_line_of_version_1_fits() -> None:
    host = ":".join(["ffff"] * 8)
    line = b"PROXY UNKNOWN " + f"{host} {host} 65535 65535\r\n".encode()
    assert len(line) == MAX_V1
    assert decode_v1(line) == (ProxyHeader(), MAX_V1)


def test_a_line_is_incomplete_up_to_the_length_limit() -> None:
    started = b"PROXY UNKNOWN ".ljust(MAX_V1, b"x")
    assert decode_v1(started[:-1]) is None
    with pytest.raises(RemoteProtocolError, match=f"longer than {MAX_V1}"):
        decode_v1(started)


def test_the_longest_header_of_version_2_is_accepted_and_a_longer_one_is_not() -> None:
    assert missing_v2(SIGNATURE + b"\x21\x11" + (MAX_V2 - MIN_V2).to_bytes(2)) == MAX_V2 - MIN_V2
    with pytest.raises(RemoteProtocolError, match=f"longer than {MAX_V2}"):
        missing_v2(SIGNATURE + b"\x21\x11" + (MAX_V2 - MIN_V2 + 1).to_bytes(2))


def test_a_host_name_is_not_an_address() -> None:
    with pytest.raises(LocalProtocolError, match="not a numeric address: 'localhost'"):
        encode_v2(("localhost", 1), PUBLIC)


ALL_F = ":".join(["ffff"] * 8)
WIDEST_4, WIDEST_6 = ("255.255.255.255", 65535), (ALL_F, 65535)


@pytest.mark.parametrize(
    ("line", "length", "header"),
    [
        (b"PROXY TCP4 255.255.255.255 255.255.255.255 65535 65535\r\n", 56, ProxyHeader(WIDEST_4, WIDEST_4)),
        (f"PROXY TCP6 {ALL_F} {ALL_F} 65535 65535\r\n".encode(), 104, ProxyHeader(WIDEST_6, WIDEST_6)),
        (b"PROXY UNKNOWN\r\n", 15, ProxyHeader()),
        (f"PROXY UNKNOWN {ALL_F} {ALL_F} 65535 65535\r\n".encode(), 107, ProxyHeader()),
        (
            b"PROXY TCP4 192.168.0.1 192.168.0.11 56324 443\r\nGET / HTTP/1.1\r\nHost: 192.168.0.11\r\n\r\n",
            47,
            ProxyHeader(("192.168.0.1", 56324), ("192.168.0.11", 443)),
        ),
    ],
)
def test_the_examples_of_the_specification_are_decoded(line: bytes, length: int, header: ProxyHeader) -> None:
    """Section 2.1: the longest line of each kind, with its length, and one in front of a request."""
    assert decode_v1(line) == (header, length)
