"""PROXY protocol headers: the visitor's address, sent in front of the visitor's bytes. Pure.

After the published specification, "The PROXY protocol, versions 1 & 2" by Willy Tarreau (haproxy.org,
doc/proxy-protocol.txt): §2.1 is the line of version 1, §2.2 the binary header of version 2:

    octets 0-11   0D 0A 0D 0A 00 0D 0A 51 55 49 54 0A       no line of HTTP, SMTP, SSH... begins so
    12            version (high nibble, 2) and command (low: 0 LOCAL, 1 PROXY)
    13            family (high nibble: 0 unspecified, 1 IPv4, 2 IPv6, 3 unix) and transport (low: 1 stream, 2 datagram)
    14-15         length of what follows, network order
    16-           source, destination (4, 16 or 108 octets each), source port, destination port (2 each); then TLVs

LOCAL means that the connection is the proxy's own, and that the receiver uses its real addresses. We send it if source
and destination have no common family. Every header we send has at least 28 bytes (LOCAL is padded with a NOOP TLV,
§2.2.4), so a receiver may read 28 at once without waiting for the visitor's bytes. Most headers have exactly 28.
"""

from __future__ import annotations

import ipaddress
import re
import struct
from dataclasses import dataclass
from functools import lru_cache

from tunneld.errors import LocalProtocolError, RemoteProtocolError

Address = tuple[str, int]
"""A numeric IPv4 or IPv6 host, and a port."""
SocketAddress = Address | tuple[str, int, int, int]
"""The same as in the `socket` module: IPv6 addresses are followed by flow and scope."""

SIGNATURE = b"\r\n\r\n\x00\r\nQUIT\n"
MIN_V2 = 16
"""Bytes before the addresses; the last two are the length."""
COMMON_V2 = 28
"""Bytes of a header for IPv4 without TLVs, and the shortest that we send: read this many first."""
MAX_V2 = MIN_V2 + 4096
"""Bytes of the longest header that we accept. The length field allows 65551; addresses and a TLV with a whole client
certificate stay below this.
"""
MAX_V1 = 107
"""Bytes of the longest line of version 1, with CRLF (§2.1)."""

_STREAM_FAMILY = {4: 0x11, 16: 0x21}
"""Family and transport, by the length of an address in bytes."""
_PORTS = struct.Struct("!HH")
_COMMON_START = SIGNATURE + b"\x21\x11\x00\x0c"
_LOCAL = SIGNATURE + b"\x20\x00\x00\x0c" + b"\x04\x00\x09" + bytes(9)
_PORT = re.compile("0|[1-9][0-9]{0,4}")


@dataclass(frozen=True, slots=True)
class ProxyHeader:
    """Source and destination of the visitor's connection; both None if the header does not have them (UNKNOWN, LOCAL,
    unix).
    """

    source: Address | None = None
    destination: Address | None = None


def encode_v2(source: SocketAddress | None, destination: SocketAddress | None) -> bytes:
    """The binary header for a visitor from `source` to `destination`; LOCAL if one is None or their families differ.

    Called for every visitor, so the part before the ports is cached. Raises `LocalProtocolError` for a host that is not
    a numeric address.
    """
    if source is None or destination is None:
        return _LOCAL
    start = _start_v2(source[0], destination[0])
    return start + _PORTS.pack(source[1], destination[1]) if start else _LOCAL


def encode_v1(source: SocketAddress | None, destination: SocketAddress | None) -> bytes:
    """The line of version 1: `PROXY TCP4 192.0.2.1 198.51.100.7 41234 80`, or `PROXY UNKNOWN`."""
    if source is None or destination is None:
        return b"PROXY UNKNOWN\r\n"
    packed_source, packed_destination = _packed(source[0]), _packed(destination[0])
    if len(packed_source) != len(packed_destination):
        return b"PROXY UNKNOWN\r\n"
    family = "TCP4" if len(packed_source) == 4 else "TCP6"
    hosts = f"{ipaddress.ip_address(packed_source)} {ipaddress.ip_address(packed_destination)}"
    return f"PROXY {family} {hosts} {source[1]} {destination[1]}\r\n".encode()


def missing_v2(data: bytes) -> int:
    """Bytes to read until the header at the start of `data` is complete, as far as is known; 0 if it is complete.

    Before the length is known, that is up to 28. Raises `RemoteProtocolError` as soon as `data` cannot begin a header.
    """
    if len(data) == COMMON_V2 and data.startswith(_COMMON_START):  # nearly all visitors
        return 0
    if not SIGNATURE.startswith(data[: len(SIGNATURE)]):
        raise RemoteProtocolError("PROXY protocol header does not begin with the signature of version 2")
    if len(data) < MIN_V2:
        return COMMON_V2 - len(data)
    size = MIN_V2 + int.from_bytes(data[14:16])
    if size > MAX_V2:
        raise RemoteProtocolError(f"PROXY protocol header of {size} bytes is longer than {MAX_V2} bytes")
    return max(0, size - len(data))


def decode(data: bytes) -> tuple[ProxyHeader, int] | None:
    """Decode a header of either version, see `decode_v1`: their first bytes differ. IPv4-mapped addresses in it are
    returned as IPv4.
    """
    found = decode_v2(data) if data.startswith(b"\r") else decode_v1(data)
    if found is None:
        return None
    header, size = found
    return ProxyHeader(_unmap_address(header.source), _unmap_address(header.destination)), size


def decode_v2(data: bytes) -> tuple[ProxyHeader, int] | None:
    """Decode the header at the start of `data`. Returns it with its length in bytes, or None if it is not complete.

    The bytes after that length are the visitor's. Raises `RemoteProtocolError`.
    """
    if missing_v2(data) or len(data) < MIN_V2:
        return None
    version, command = divmod(data[12], 16)
    family, transport = divmod(data[13], 16)
    size = MIN_V2 + int.from_bytes(data[14:16])
    if version != 2 or command > 1:
        raise RemoteProtocolError(f"PROXY protocol header has an unknown version or command: 0x{data[12]:02x}")
    if family > 3 or transport > 2:
        raise RemoteProtocolError(f"PROXY protocol header has an unknown family or transport: 0x{data[13]:02x}")
    width = {1: 4, 2: 16}.get(family, 0)
    if command == 0 or transport == 0 or width == 0:
        return ProxyHeader(), size
    if size < MIN_V2 + 2 * width + 4:
        raise RemoteProtocolError(f"PROXY protocol header of {size} bytes is too short for its addresses")
    return _addresses(data[MIN_V2:], width), size


def decode_v1(data: bytes) -> tuple[ProxyHeader, int] | None:
    """Decode the line at the start of `data`. Returns the header with its length in bytes, or None if it is not
    complete.

    Raises `RemoteProtocolError` as soon as `data` cannot begin a header.
    """
    if not (data[:6] == b"PROXY " or b"PROXY ".startswith(data)):
        raise RemoteProtocolError("PROXY protocol header does not start with PROXY")
    end = data.find(b"\r\n", 0, MAX_V1)
    if end < 0:
        if len(data) >= MAX_V1:
            raise RemoteProtocolError(f"PROXY protocol line is longer than {MAX_V1} bytes")
        return None
    words = data[6:end].decode("latin-1").split(" ")
    if words[0] == "UNKNOWN":
        return ProxyHeader(), end + 2
    return _parse_v1(words), end + 2


def _addresses(block: bytes, width: int) -> ProxyHeader:
    source, destination = block[:width], block[width : 2 * width]
    source_port, destination_port = _PORTS.unpack_from(block, 2 * width)
    return ProxyHeader((_host(source), source_port), (_host(destination), destination_port))


def _parse_v1(words: list[str]) -> ProxyHeader:
    try:
        family, source, destination, source_port, destination_port = words
        parse = {"TCP4": ipaddress.IPv4Address, "TCP6": ipaddress.IPv6Address}[family]
        return ProxyHeader(
            (str(parse(source)), _port(source_port)),
            (str(parse(destination)), _port(destination_port)),
        )
    except (ValueError, KeyError):
        raise RemoteProtocolError(f"PROXY protocol line is malformed: {' '.join(words)!r}") from None


def _port(text: str) -> int:
    if not _PORT.fullmatch(text) or int(text) > 65535:
        raise ValueError(text)
    return int(text)


def _unmap_address(address: Address | None) -> Address | None:
    if address is None:
        return None
    host = ipaddress.ip_address(address[0])
    mapped = host.ipv4_mapped if isinstance(host, ipaddress.IPv6Address) else None
    return str(mapped or host), address[1]


@lru_cache(maxsize=4096)  # visitors return; a miss costs 3 µs
def _start_v2(source: str, destination: str) -> bytes:
    """The header before the ports; empty if the two have no common family."""
    packed_source, packed_destination = _packed(source), _packed(destination)
    if len(packed_source) != len(packed_destination):
        return b""
    addresses = packed_source + packed_destination
    family = _STREAM_FAMILY[len(packed_source)]
    return SIGNATURE + bytes((0x21, family, 0, len(addresses) + _PORTS.size)) + addresses


@lru_cache(maxsize=4096)
def _host(packed: bytes) -> str:
    """The text of a packed address, the reverse of `_packed`."""
    return str(ipaddress.ip_address(packed))


@lru_cache(maxsize=256)  # the destination is nearly always the same
def _packed(host: str) -> bytes:
    """An address as bytes."""
    try:
        return ipaddress.ip_address(host).packed
    except ValueError:
        raise LocalProtocolError(f"not a numeric address: {host!r}") from None
