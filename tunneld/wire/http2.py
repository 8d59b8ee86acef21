"""Messages of HTTP/2 as messages of HTTP/1.1, and back. Pure. RFC 9113 §8.

    HEADERS, DATA... of a stream  ──►  a request of HTTP/1.1, which is then read as strictly as any other (http1.py)
    a response of HTTP/1.1        ──►  HEADERS, DATA... of the stream

A field of HTTP/2 may have bytes that would end a line of HTTP/1.1, or make two requests of one: a request with any is
refused (RFC 9113 §8.2.1, §10.3). Frames, compression and windows are the `h2` library's concern.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from tunneld.wire.chunked import MAX_SIZE_DIGITS, MAX_SIZE_LINE_BYTES, MAX_TRAILER_BYTES
from tunneld.wire.http1 import Fields, HeadError, ResponseHead, forwarded_fields

_METHOD = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_TARGET = re.compile(rb"[!-~]+")
_NAME = re.compile(rb"[!#$%&'*+\-.^_`|~0-9a-z]+")
_VALUE = re.compile(rb"(?:[!-~\x80-\xff](?:[\t -~\x80-\xff]*[!-~\x80-\xff])?)?")
_SIZE = re.compile(rb"[0-9A-Fa-f]+")
_PSEUDO = (b":method", b":scheme", b":authority", b":path")
_FRAMING = frozenset((b"host", b"cookie", b"content-length"))


def request_head(headers: Iterable[tuple[bytes, bytes]], *, has_body: bool) -> bytes:
    """The head of a request in HTTP/1.1. `has_body`: DATA frames may follow; without a Content-Length they become
    chunks. Raises `HeadError` where the headers cannot be written as one request.
    """
    pseudo: dict[bytes, bytes] = {}
    fields: Fields = []
    for name, value in headers:
        if not name.startswith(b":"):
            if not _NAME.fullmatch(name):
                raise HeadError("malformed field name")
            fields.append((name, value))
        elif name not in _PSEUDO or name in pseudo or fields:
            raise HeadError("pseudo-header field is unknown, repeated or out of place")
        else:
            pseudo[name] = value
    if not all(_VALUE.fullmatch(value) for _, value in fields):
        raise HeadError("malformed field value")
    method, target = pseudo.get(b":method", b""), pseudo.get(b":path", b"")
    if not _METHOD.fullmatch(method) or not _TARGET.fullmatch(target):
        raise HeadError("malformed method or path")
    if not target.startswith(b"/") and (method, target) != (b"OPTIONS", b"*"):
        raise HeadError("path does not begin with a slash")
    lines = [b"%b %b HTTP/1.1\r\nhost: %b\r\n" % (method, target, _authority(pseudo, fields))]
    lines += [b"%b: %b\r\n" % field for field in forwarded_fields(fields, _FRAMING)]
    if cookies := [value for name, value in fields if name == b"cookie"]:
        lines.append(b"cookie: %b\r\n" % b"; ".join(cookies))
    lines.append(_framing(fields, has_body=has_body))
    return b"".join(lines)


def has_length(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Whether a request tells the length of its body, so that it goes on without chunks."""
    return any(name == b"content-length" for name, _ in headers)


def trailer_section(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """The end of a chunked body, with the trailer fields of a request. Raises `HeadError`."""
    lines = [b"0\r\n"]
    for name, value in headers:
        if not _NAME.fullmatch(name) or not _VALUE.fullmatch(value):
            raise HeadError("malformed trailer field")
        lines.append(b"%b: %b\r\n" % (name, value))
    return b"".join([*lines, b"\r\n"])


def response_headers(head: ResponseHead) -> Fields:
    """The headers of a response in HTTP/2."""
    fields = [(name.lower(), value) for name, value in forwarded_fields(head.fields)]
    return [(b":status", b"%d" % head.status), *fields]


def _authority(pseudo: dict[bytes, bytes], fields: Fields) -> bytes:
    """What the request names as its host. Raises `HeadError` where it names two, or none."""
    named = {value for name, value in fields if name == b"host"}
    if b":authority" in pseudo:
        named.add(pseudo[b":authority"])
    if len(named) != 1 or not _VALUE.fullmatch(authority := named.pop()):
        raise HeadError("request names several hosts, or none")
    return authority


def _framing(fields: Fields, *, has_body: bool) -> bytes:
    lengths = [value for name, value in fields if name == b"content-length"]
    if len(lengths) > 1 or not all(value.isdigit() for value in lengths):
        raise HeadError("Content-Length is not one number")
    if lengths:
        if int(lengths[0][:20]) and not has_body:
            raise HeadError("body is shorter than its Content-Length")
        return b"content-length: %b\r\n\r\n" % lengths[0]
    return b"transfer-encoding: chunked\r\n\r\n" if has_body else b"\r\n"


class Dechunker:
    """Takes the chunks off a response that the relay itself has written."""

    def __init__(self) -> None:
        self.is_over = False
        self.trailers: Fields = []
        self._line = bytearray()
        self._left = 0  # bytes of the chunk that are to come, with the line end behind it
        self._in_trailers = False

    def feed(self, data: bytes) -> bytes:
        """Take bytes; return the data in them. Raises `HeadError`."""
        out, at = bytearray(), 0
        while at < len(data) and not self.is_over:
            if self._left > 0:
                taken = data[at : at + self._left]
                out += taken[: max(0, self._left - 2)]
                self._left -= len(taken)
                at += len(taken)
                continue
            end = data.find(b"\n", at)
            end = len(data) if end < 0 else end + 1
            self._line += data[at:end]
            at = end
            if len(self._line) > (MAX_TRAILER_BYTES if self._in_trailers else MAX_SIZE_LINE_BYTES):
                raise HeadError("line of a chunked body is too long")
            if self._line.endswith(b"\r\n"):
                line = bytes(self._line[:-2])
                self._line.clear()
                self._on_line(line)
        return bytes(out)

    def _on_line(self, line: bytes) -> None:
        if self._in_trailers:
            name, _, value = line.partition(b":")
            if line:
                self.trailers.append((name.lower(), value.strip(b" \t")))
            else:
                self.is_over = True
        elif not _SIZE.fullmatch(line) or len(line) > MAX_SIZE_DIGITS:
            raise HeadError("chunk size is no hexadecimal number")
        elif size := int(line, 16):
            self._left = size + 2
        else:
            self._in_trailers = True
