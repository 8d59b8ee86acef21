"""Requests that two readers may understand differently: what an attacker sends to put a request of its own in front of
another visitor's.

The heads of `tests.wire.test_http1.REFUSED` are refused before a hidden server sees anything. Here are the bodies, and
what must pass. `/smuggled` is a target that no server may ever see, and no visitor get an answer for; a request for
`/marker` follows each case on the same connection.
"""

from __future__ import annotations

from dataclasses import dataclass

NAME = b"blog.t.example.org"
"""The name of the tunnel."""
HOST = b"Host: " + NAME + b"\r\n"
SMUGGLED = b"GET /smuggled HTTP/1.1\r\n" + HOST + b"\r\n"
CHUNKED = b"POST /case HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Case:
    """Bytes of a visitor. `status` is the relay's refusal; None: the request passes."""

    data: bytes
    status: int | None = None
    method: str = "POST"


def _known(body: bytes, *lines: bytes, start: bytes = b"POST /case HTTP/1.1") -> bytes:
    fields = b"".join(line + b"\r\n" for line in lines)
    return start + b"\r\n" + HOST + fields + b"Content-Length: %d\r\n\r\n" % len(body) + body


REFUSED_BODIES = {
    "size with a sign": CHUNKED + b"+5\r\nhello\r\n0\r\n\r\n",
    "negative size": CHUNKED + b"-5\r\nhello\r\n0\r\n\r\n",
    "size with 0x": CHUNKED + b"0x5\r\nhello\r\n0\r\n\r\n",
    "size with an underscore": CHUNKED + b"0_5\r\nhello\r\n0\r\n\r\n",
    "size with a space in front": CHUNKED + b" 5\r\nhello\r\n0\r\n\r\n",
    "size with a space behind": CHUNKED + b"5 \r\nhello\r\n0\r\n\r\n",
    "size with a tab behind": CHUNKED + b"5\t\r\nhello\r\n0\r\n\r\n",
    "size with a comma": CHUNKED + b"5,5\r\nhello\r\n0\r\n\r\n",
    "size with NUL": CHUNKED + b"5\0\r\nhello\r\n0\r\n\r\n",
    "empty size": CHUNKED + b"\r\nhello\r\n0\r\n\r\n",
    "size that is no number": CHUNKED + b"xyz\r\nhello\r\n0\r\n\r\n",
    "size above 2^64": CHUNKED + b"10000000000000005\r\nhello\r\n0\r\n\r\n",
    "size of 17 digits": CHUNKED + b"f0000000000000005\r\nhello\r\n0\r\n\r\n",
    "size of many zeros": CHUNKED + b"0" * 300 + b"5\r\nhello\r\n0\r\n\r\n",
    "size in full-width digits": CHUNKED + b"\xef\xbc\x95\r\nhello\r\n0\r\n\r\n",
    "LF behind the size": CHUNKED + b"5\nhello\r\n0\r\n\r\n",
    "CR behind the size": CHUNKED + b"5\rXhello\r\n0\r\n\r\n",
    "LF behind the data": CHUNKED + b"5\r\nhello\n0\r\n\r\n",
    "no line end behind the data": CHUNKED + b"5\r\nhello0\r\n\r\n" + SMUGGLED,
    "chunk longer than its size": CHUNKED + b"3\r\nhello\r\n0\r\n\r\n" + SMUGGLED,
    "two bytes that are no CRLF": CHUNKED + b"5\r\nhelloXX0\r\n\r\n" + SMUGGLED,
    "LF in an extension": CHUNKED + b"5;a\nb\r\nhello\r\n0\r\n\r\n",
    "CR in an extension": CHUNKED + b"5;a\rb\r\nhello\r\n0\r\n\r\n",
    "NUL in an extension": CHUNKED + b"5;a\0b\r\nhello\r\n0\r\n\r\n",
    "extension of 300 bytes": CHUNKED + b"5;" + b"a" * 300 + b"\r\nhello\r\n0\r\n\r\n",
    "last chunk with LF": CHUNKED + b"0\n\r\n" + SMUGGLED,
    "end with LF": CHUNKED + b"0\r\n\n" + SMUGGLED,
    "request in place of the end": CHUNKED + b"0\r\n" + SMUGGLED,
    "trailer without colon": CHUNKED + b"0\r\nnonsense\r\n\r\n",
    "trailer with a space in its name": CHUNKED + b"0\r\nX Y: 1\r\n\r\n",
    "trailer with a space before the colon": CHUNKED + b"0\r\nX : 1\r\n\r\n",
    "folded trailer": CHUNKED + b"0\r\nX: 1\r\n Y: 2\r\n\r\n",
    "trailer with NUL": CHUNKED + b"0\r\nX: \0\r\n\r\n",
    "trailer with CR": CHUNKED + b"0\r\nX: a\rb\r\n\r\n",
    "trailers of 9000 bytes": CHUNKED + b"0\r\n" + b"X: 1\r\n" * 1500 + b"\r\n",
}
"""Answered with 400, and nothing behind them is read."""

PASSED = {
    "GET": Case(b"GET /case HTTP/1.1\r\n" + HOST + b"\r\n", method="GET"),
    "GET with a body": Case(_known(SMUGGLED, start=b"GET /case HTTP/1.1"), method="GET"),
    "GET with a chunked body": Case(
        CHUNKED.replace(b"POST", b"GET") + b"%x\r\n" % len(SMUGGLED) + SMUGGLED + b"\r\n0\r\n\r\n", method="GET"
    ),
    "HEAD": Case(b"HEAD /case HTTP/1.1\r\n" + HOST + b"\r\n", method="HEAD"),
    "body that is a request": Case(_known(SMUGGLED)),
    "empty body": Case(_known(b"")),
    "chunk that is a request": Case(CHUNKED + b"%x\r\n" % len(SMUGGLED) + SMUGGLED + b"\r\n0\r\n\r\n"),
    "chunks of one byte": Case(CHUNKED + b"".join(b"1\r\n%c\r\n" % byte for byte in SMUGGLED) + b"0\r\n\r\n"),
    "empty chunked body": Case(CHUNKED + b"0\r\n\r\n"),
    "size with zeros in front": Case(CHUNKED + b"0005\r\nhello\r\n000\r\n\r\n"),
    "size in capitals": Case(CHUNKED + b"A\r\nhellohello\r\n0\r\n\r\n"),
    "extensions": Case(CHUNKED + b'5;a=1;b="x;y"\r\nhello\r\n0;last\r\n\r\n'),
    "space in front of an extension": Case(CHUNKED + b"5 ;a\r\nhello\r\n0\r\n\r\n"),
    "trailers": Case(CHUNKED + b"5\r\nhello\r\n0\r\nX-Sum: 1\r\nX-Other: 2\r\n\r\n"),
    "trailers about the framing": Case(
        CHUNKED + b"5\r\nhello\r\n0\r\nContent-Length: 50\r\nTransfer-Encoding: chunked\r\nHost: other\r\n\r\n"
    ),
    "trailer of the relay": Case(CHUNKED + b"5\r\nhello\r\n0\r\nX-Forwarded-For: 127.0.0.1\r\n\r\n"),
    "coding in capitals": Case(CHUNKED.replace(b"chunked", b"CHUNKED") + b"5\r\nhello\r\n0\r\n\r\n"),
    "empty lines in front": Case(b"\r\n\r\nGET /case HTTP/1.1\r\n" + HOST + b"\r\n", method="GET"),
    "absolute target": Case(b"GET http://" + NAME + b"/case HTTP/1.1\r\n" + HOST + b"\r\n", method="GET"),
    "field names with underscores": Case(_known(SMUGGLED, b"Content_Length: 0", b"Transfer_Encoding: chunked")),
    "Connection names Content-Length": Case(_known(SMUGGLED, b"Connection: Content-Length, keep-alive")),
    "Connection names Host": Case(_known(SMUGGLED, b"Connection: Host")),
    "upgrade to h2c": Case(
        _known(b"", b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABkAAQAAP__")
    ),
    "upgrade with a body": Case(_known(SMUGGLED, b"Connection: Upgrade", b"Upgrade: websocket")),
    "upgrade that is refused": Case(
        b"GET /case HTTP/1.1\r\n" + HOST + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n", method="GET"
    ),
    "long value": Case(_known(b"", b"X: " + b"a" * 4000)),
    "bytes above ASCII in a value": Case(_known(b"", b"X: \xe2\x82\xac")),
    "percent-encoded line ends": Case(
        b"GET /case?%0d%0aHost:%20other%0d%0a HTTP/1.1\r\n" + HOST + b"\r\n", method="GET"
    ),
}
"""Each is exactly one request, here and at the hidden server."""


def cases() -> dict[str, Case]:
    """Return all of them by name."""
    from tests.wire.test_http1 import REFUSED  # noqa: PLC0415 - tests of the parser need no relay

    heads = {f"head: {name}": Case(data, status) for name, (data, status) in REFUSED.items()}
    bodies = {f"body: {name}": Case(data, 400) for name, data in REFUSED_BODIES.items()}
    return heads | bodies | PASSED
