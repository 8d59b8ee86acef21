"""The first message of a TLS connection, read without consuming it: for which name, and in which protocols. Pure.

RFC 8446 §5.1 (records), §4 (handshake messages), §4.1.2 (ClientHello); RFC 6066 §3 (server_name); RFC 7301 §3.1 (ALPN):

    record       0x16, version (2), length (2), fragment         a message may be split over several records
    message      0x01, length (3), body
    body         version (2), random (32), session id (1+), cipher suites (2+), compression (1+), extensions (2+)
    extension    type (2), length (2), data

A browser's ClientHello has about 2 KB, with a post-quantum key share, and arrives in two packets. With Encrypted Client
Hello only the outer name is seen; what browsers send without a key for it (GREASE) is an extension like any other.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

from tunneld.errors import RemoteProtocolError

MAX_HELLO_BYTES = 16384
"""Bytes of the message with its records: eight times what browsers send, and one record's most."""
HANDSHAKE = 0x16
CLIENT_HELLO = 0x01
SERVER_NAME, ALPN = 0, 16

UNEXPECTED_MESSAGE, ILLEGAL_PARAMETER, DECODE_ERROR, PROTOCOL_VERSION = 10, 47, 50, 70
UNRECOGNIZED_NAME, NO_APPLICATION_PROTOCOL = 112, 120
"""Alerts (RFC 8446 §6, RFC 6066 §9)."""

_EXTENSION = struct.Struct(">HH")
_NAME = re.compile(rb"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,252}[A-Za-z0-9_])?\.?")


class HelloError(RemoteProtocolError):
    """No ClientHello that can be served. `alert` is what the peer is told."""

    def __init__(self, message: str, alert: int) -> None:
        super().__init__(message)
        self.alert = alert


@dataclass(frozen=True, slots=True)
class ClientHello:
    """What a client asks for."""

    server_name: str  # in lower case, without a dot at the end; empty: it named none
    protocols: tuple[bytes, ...]  # ALPN, by preference


def encode_alert(alert: int) -> bytes:
    """A fatal alert in a record of its own, as the answer to a ClientHello (RFC 8446 §6)."""
    return b"\x15\x03\x03\x00\x02\x02" + bytes((alert,))


def parse_client_hello(data: bytes | memoryview) -> ClientHello | None:
    """Read the ClientHello at the start of `data`; None if it is not complete. Raises `HelloError`."""
    message = _message(bytes(data))
    if message is not None:
        return _hello(_Reader(message))
    if len(data) >= MAX_HELLO_BYTES:
        raise HelloError(f"ClientHello exceeds {MAX_HELLO_BYTES} bytes", DECODE_ERROR)
    return None


def _message(data: bytes) -> bytes | None:
    """The body of the first handshake message, joined from its records; None if it is not complete."""
    if (size := _size_in_one_record(data)) is not None:
        return data[9 : 5 + size]
    joined, at = bytearray(), 0
    while True:
        if len(joined) >= 4:
            if joined[0] != CLIENT_HELLO:
                raise HelloError("first message is no ClientHello", UNEXPECTED_MESSAGE)
            size = 4 + int.from_bytes(joined[1:4])
            if size > MAX_HELLO_BYTES:
                raise HelloError(f"ClientHello exceeds {MAX_HELLO_BYTES} bytes", DECODE_ERROR)
            if len(joined) >= size:
                return bytes(joined[4:size])
        header = data[at : at + 5]
        _check_record(header)
        if len(header) < 5:
            return None
        length = int.from_bytes(header[3:5])
        if not length or length > MAX_HELLO_BYTES:
            raise HelloError("record is empty or too long", DECODE_ERROR)
        fragment = data[at + 5 : at + 5 + length]
        if joined + fragment and (joined + fragment)[0] != CLIENT_HELLO:
            raise HelloError("first message is no ClientHello", UNEXPECTED_MESSAGE)
        joined += fragment
        at += 5 + length
        if len(fragment) < length and not _is_complete(joined):
            return None


def _size_in_one_record(data: bytes) -> int | None:
    """The size of the message, if it is all there, and in one record: nearly always."""
    if len(data) < 9 or data[0] != HANDSHAKE or data[1] != 3 or data[5] != CLIENT_HELLO:
        return None
    length, size = int.from_bytes(data[3:5]), 4 + int.from_bytes(data[6:9])
    return size if size <= length <= MAX_HELLO_BYTES and len(data) >= 5 + size else None


def _is_complete(joined: bytearray) -> bool:
    return len(joined) >= 4 and len(joined) >= 4 + int.from_bytes(joined[1:4])


def _check_record(header: bytes) -> None:
    if header and header[0] != HANDSHAKE:
        raise HelloError("not a TLS handshake", UNEXPECTED_MESSAGE)
    if len(header) > 1 and header[1] != 3:
        raise HelloError("unrecognized version of TLS records", PROTOCOL_VERSION)


class _Reader:
    """Takes fields off a message. Raises `HelloError` where it is too short."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def at_end(self) -> bool:
        return self._at == len(self._data)

    def take(self, count: int) -> bytes:
        taken = self._data[self._at : self._at + count]
        if len(taken) < count:
            raise HelloError("ClientHello is truncated", DECODE_ERROR)
        self._at += count
        return taken

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size))

    def vector(self, size: int) -> bytes:
        """A field with its length in front, in `size` bytes."""
        return self.take(self.number(size))


def _hello(body: _Reader) -> ClientHello:
    body.take(2 + 32)
    body.vector(1)
    body.vector(2)
    body.vector(1)
    name = ""
    protocols: tuple[bytes, ...] = ()
    if body.at_end():
        return ClientHello(name, protocols)
    extensions = _extensions(body.vector(2))
    if not body.at_end():
        raise HelloError("bytes follow the extensions of the ClientHello", DECODE_ERROR)
    if (data := extensions.get(SERVER_NAME)) is not None:
        name = _server_name(_Reader(data))
    if (data := extensions.get(ALPN)) is not None:
        protocols = _protocols(_Reader(data))
    return ClientHello(name, protocols)


def _extensions(data: bytes) -> dict[int, bytes]:
    """What each extension has, by its type. Browsers send twenty: this takes most of the time."""
    found: dict[int, bytes] = {}
    at, size = 0, len(data)
    while at < size:
        begin = at + _EXTENSION.size
        if begin > size:
            raise HelloError("ClientHello is truncated", DECODE_ERROR)
        kind, length = _EXTENSION.unpack_from(data, at)
        at = begin + length
        if at > size:
            raise HelloError("ClientHello is truncated", DECODE_ERROR)
        if kind in found:
            raise HelloError("ClientHello has an extension twice", ILLEGAL_PARAMETER)
        found[kind] = data[begin:at]
    return found


def _server_name(data: _Reader) -> str:
    names = _Reader(data.vector(2))
    if not data.at_end() or names.at_end():
        raise HelloError("malformed server_name", DECODE_ERROR)
    kind, name = names.number(1), names.vector(2)
    if kind != 0 or not names.at_end():
        raise HelloError("server_name is not one host name", ILLEGAL_PARAMETER)
    if not _NAME.fullmatch(name):
        raise HelloError("server_name is no host name", UNRECOGNIZED_NAME)
    return name.decode("ascii").lower().removesuffix(".")


def _protocols(data: _Reader) -> tuple[bytes, ...]:
    names, found = _Reader(data.vector(2)), []
    while not names.at_end():
        found.append(names.vector(1))
    if not data.at_end() or not found or b"" in found:
        raise HelloError("malformed list of protocols (ALPN)", DECODE_ERROR)
    return tuple(found)
