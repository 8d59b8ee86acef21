"""Heads of HTTP/1.1 messages: read strictly, and written again for the next hop. Pure. RFC 9112 and RFC 9110.

The relay reads requests that somebody else's server will read again. Two parsers that disagree about where a message
ends let one visitor answer for another (request smuggling), so a head that any reader could understand in two ways is
refused. httptools (llhttp, the parser of Node.js) reads the heads and refuses what is wrong with lines, names, values
and framing; this module refuses in addition:

    two Host fields, none, an invalid one, or one that contradicts an absolute target      RFC 9112 §3.2, §3.2.2
    Transfer-Encoding that is not exactly `chunked`, or in a message of HTTP/1.0           §6.1
    any request line but `METHOD SP target SP HTTP/1.x`, userinfo or a fragment            §3
    versions other than 1.0 and 1.1, and what llhttp reads of RTSP and ICE                 §2.3
    more than MAX_FIELDS fields, a target above MAX_TARGET_BYTES

A *hop-by-hop* field concerns one connection only (RFC 9110 §7.6.1): `forwarded_fields` removes these fields and all
that Connection names, except the ones that the relay relies on or sets itself; a visitor could make the relay drop its
own X-Forwarded-For otherwise.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import httptools

from tunneld.errors import RemoteProtocolError
from tunneld.wire.http_fields import HOP_BY_HOP, KEPT_FIELDS

Fields = list[tuple[bytes, bytes]]
"""Field lines in their order: names as they were written, values without the whitespace around them."""

MAX_FIELDS = 100
"Field lines of one head. Browsers send about 20, behind two proxies; a CDN adds 15."
MAX_TARGET_BYTES = 8192
"Bytes of a request target: what nginx, Apache and browsers agree on."
MAX_BODY_BYTES = 2**63 - 1
"Bytes that Content-Length may announce: what fits a signed 64-bit integer, as most servers count."

NO_BODY_STATUSES = frozenset((204, 304))

_HOST = re.compile(rb"(?:\[[0-9A-Fa-f:.]+\]|[0-9A-Za-z._-]+)(?::[0-9]{1,5})?")
_ABSOLUTE = re.compile(rb"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#]*)([^#]*)")
_TOKEN = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")


class HeadError(RemoteProtocolError):
    """A head that cannot be passed on. `status` is the answer to a visitor that sent it; a head of a hidden server is
    answered by 502, whatever is wrong with it.
    """

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(slots=True)
class RequestHead:
    """The head of a request that may be passed on."""

    method: bytes
    target: bytes  # origin-form (`/path?query`), or `*`
    minor_version: int  # 0 or 1
    authority: bytes  # the host that the visitor named, with its port if it named one
    host: str  # the same in lower case, without port and without the dot at the end: what requests are routed by
    fields: Fields  # all of them, as they came
    body_length: int | None  # bytes; None: chunked
    keep_alive: bool  # the visitor expects that its connection stays open
    upgrade: bytes  # the protocol to which the visitor wants to change, or empty
    expects_continue: bool  # it waits for `100 Continue` before it sends the body

    @property
    def path(self) -> bytes:
        """The target without its query."""
        return self.target.partition(b"?")[0]


@dataclass(slots=True)
class ResponseHead:
    """The head of a response that may be passed on."""

    status: int
    reason: bytes
    minor_version: int
    fields: Fields
    body_length: int | None  # bytes; None: chunked, or until the connection ends
    until_close: bool  # the body ends with the connection
    keep_alive: bool  # the hidden server keeps its connection open after this response

    @property
    def is_interim(self) -> bool:
        """Whether another head follows: 100 Continue, 103 Early Hints. 101 is final."""
        return self.status < 200 and self.status != 101

    @property
    def is_chunked(self) -> bool:
        """Whether the body is chunked."""
        return self.body_length is None and not self.until_close


def find_head(data: bytes | bytearray, max_bytes: int) -> int:
    """The length of the head at the start of `data`, with the empty line behind it; 0 where it is not complete.

    Raises `HeadError` (431) where it has more than `max_bytes`.
    """
    end = data.find(b"\r\n\r\n", 0, max_bytes)
    if end >= 0:
        return end + 4
    if len(data) >= max_bytes:
        raise HeadError(f"head exceeds {max_bytes} bytes", 431)
    return 0


def skip_empty_lines(data: bytes | bytearray) -> int:
    """How many bytes of `data` are empty lines in front of a request line: at most two lines, see RFC 9112 §2.2."""
    return 4 if data.startswith(b"\r\n\r\n") else 2 if data.startswith(b"\r\n") else 0


def parse_request(head: bytes) -> RequestHead:
    """Parse a complete request head, see `find_head`. Raises `HeadError`."""
    parsed = _Collected()
    parser = httptools.HttpRequestParser(parsed)
    _feed(parser, head)
    method, target = parser.get_method(), bytes(parsed.target)
    minor = _request_line_version(head, method, target)
    fields = parsed.fields
    seen = _index(fields)
    body_length = _body_length(seen, minor)
    connection = _tokens(seen.get(b"connection", ()))
    target, authority = _route(method, target, seen.get(b"host", ()))
    upgrade = seen.get(b"upgrade", ())
    expects = _tokens(seen.get(b"expect", ()))
    if expects and expects != {b"100-continue"}:
        raise HeadError("Expect has a value other than 100-continue", 417)
    return RequestHead(
        method=method,
        target=target,
        minor_version=minor,
        authority=authority,
        host=host_name(authority),
        fields=fields,
        body_length=body_length,
        keep_alive=_keeps_alive(minor, connection),
        upgrade=_upgrade(method, minor, body_length, connection, upgrade),
        expects_continue=bool(expects) and minor == 1,
    )


def parse_response(head: bytes, method: bytes) -> ResponseHead:
    """Parse a complete response head; `method` is the one of its request. Raises `HeadError`."""
    parsed = _Collected()
    parser = httptools.HttpResponseParser(parsed)
    _feed(parser, head)
    status, fields = parser.get_status_code(), parsed.fields
    if not head.startswith((b"HTTP/1.1 ", b"HTTP/1.0 ")) or head[12:13] not in b" \r":
        raise HeadError("response does not begin with HTTP/1.0 or HTTP/1.1 and a status", 502)
    minor = head[7] - 0x30
    seen = _index(fields)
    no_body = method == b"HEAD" or status < 200 or status in NO_BODY_STATUSES
    announced = b"content-length" in seen or b"transfer-encoding" in seen
    length = _body_length(seen, minor)
    until_close = not no_body and not announced
    return ResponseHead(
        status=status,
        reason=bytes(parsed.reason),
        minor_version=minor,
        fields=fields,
        body_length=0 if no_body else length,
        until_close=until_close,
        keep_alive=not until_close and _keeps_alive(minor, _tokens(seen.get(b"connection", ()))),
    )


def forwarded_fields(fields: Fields, replaced: frozenset[bytes] = frozenset()) -> Fields:
    """The fields that go to the next hop: without hop-by-hop fields, without the ones that Connection names, and
    without the ones whose names, in lower case, are in `replaced`.
    """
    named: set[bytes] = set()
    for name, value in fields:
        if len(name) == 10 and name.lower() == b"connection":
            named |= _tokens((value,))
    named -= KEPT_FIELDS
    removed = HOP_BY_HOP | replaced | named if named else HOP_BY_HOP | replaced
    return [field for field in fields if field[0].lower() not in removed]


def encode_request(head: RequestHead, fields: Fields) -> bytes:
    """Write the request for the next hop with these end-to-end fields; the framing is the one of `head`."""
    lines = [b"%b %b HTTP/1.%d\r\n" % (head.method, head.target, head.minor_version)]
    lines += [b"%b: %b\r\n" % field for field in fields]
    if head.body_length is None:
        lines.append(b"Transfer-Encoding: chunked\r\n")
    if head.upgrade:
        lines.append(b"Connection: Upgrade\r\nUpgrade: %b\r\n" % head.upgrade)
    elif head.minor_version == 0:
        lines.append(b"Connection: keep-alive\r\n")
    lines.append(b"\r\n")
    return b"".join(lines)


def encode_response(head: ResponseHead, fields: Fields, request: RequestHead, *, keep_alive: bool) -> bytes:
    """Write the response for the visitor with these end-to-end fields. `keep_alive` tells whether the visitor's
    connection stays open after it.
    """
    lines = [b"HTTP/1.1 %d %b\r\n" % (head.status, head.reason)]
    lines += [b"%b: %b\r\n" % field for field in fields]
    if head.is_chunked:
        lines.append(b"Transfer-Encoding: chunked\r\n")
    if head.status == 101:
        lines += [b"%b: %b\r\n" % field for field in head.fields if field[0].lower() == b"upgrade"]
        lines.append(b"Connection: Upgrade\r\n")
    elif not head.is_interim:
        if not keep_alive:
            lines.append(b"Connection: close\r\n")
        elif request.minor_version == 0:
            lines.append(b"Connection: keep-alive\r\n")
    lines.append(b"\r\n")
    return b"".join(lines)


def host_name(authority: bytes) -> str:
    """The host of an authority as requests are routed by it: lower case, without port, without a dot at the end."""
    host = authority if authority.endswith(b"]") else authority.rpartition(b":")[0] or authority
    return host.decode("ascii").lower().removesuffix(".")


class _Collected:
    """What the parser reports of one head."""

    __slots__ = ("fields", "reason", "target")

    def __init__(self) -> None:
        self.target = b""
        self.reason = b""
        self.fields: Fields = []

    def on_url(self, url: bytes) -> None:
        self.target += url

    def on_status(self, reason: bytes) -> None:
        self.reason += reason

    def on_header(self, name: bytes, value: bytes) -> None:
        self.fields.append((name, value))


def _feed(parser: httptools.HttpRequestParser | httptools.HttpResponseParser, head: bytes) -> None:
    try:
        parser.feed_data(head)
    except httptools.HttpParserUpgrade:  # an upgrade or CONNECT: what follows the head is no HTTP
        pass
    except httptools.HttpParserInvalidMethodError:
        raise HeadError("unrecognized method", 501) from None
    except httptools.HttpParserError as error:
        raise HeadError(f"malformed head: {error}") from None


def _request_line_version(head: bytes, method: bytes, target: bytes) -> int:
    """The minor version. Raises `HeadError` where the request line is not exactly what RFC 9112 §3 has."""
    if len(target) > MAX_TARGET_BYTES:
        raise HeadError(f"target exceeds {MAX_TARGET_BYTES} bytes", 414)
    for minor, version in enumerate((b" HTTP/1.0\r\n", b" HTTP/1.1\r\n")):
        if head.startswith(b"%b %b%b" % (method, target, version)):
            return minor
    raise HeadError(
        "request line is not METHOD SP target SP HTTP/1.1", 505 if b" HTTP/" in head[:MAX_TARGET_BYTES] else 400
    )


def _index(fields: Fields) -> dict[bytes, list[bytes]]:
    """The values by name in lower case. Raises `HeadError` for too many."""
    if len(fields) > MAX_FIELDS:
        raise HeadError(f"head has more than {MAX_FIELDS} fields", 431)
    seen: dict[bytes, list[bytes]] = {}
    for name, value in fields:
        seen.setdefault(name.lower(), []).append(value)
    return seen


def _body_length(seen: dict[bytes, list[bytes]], minor: int) -> int | None:
    """Bytes of the body that the fields announce, or None for chunked. Raises `HeadError`."""
    lengths, codings = seen.get(b"content-length", ()), seen.get(b"transfer-encoding", ())
    if codings:
        if lengths:
            raise HeadError("both Content-Length and Transfer-Encoding are present")
        if minor == 0:
            raise HeadError("Transfer-Encoding is not part of HTTP/1.0")
        if len(codings) > 1 or codings[0].lower() != b"chunked":
            raise HeadError("Transfer-Encoding is not exactly `chunked`", 501)
        return None
    if not lengths:
        return 0
    if len(lengths) > 1 or not lengths[0].isdigit() or len(lengths[0]) > 19 or int(lengths[0]) > MAX_BODY_BYTES:
        raise HeadError("Content-Length is not one number below 2^63")
    return int(lengths[0])


def _route(method: bytes, target: bytes, hosts: list[bytes] | tuple[()]) -> tuple[bytes, bytes]:
    """The target in origin-form, and the authority. Raises `HeadError`."""
    if len(hosts) != 1:
        raise HeadError("there are several Host fields" if hosts else "there is no Host field")
    authority = hosts[0]
    if not _HOST.fullmatch(authority):
        raise HeadError("Host is no host name or address")
    if method == b"CONNECT":
        raise HeadError("CONNECT is for proxies: this is none", 405)
    if target.startswith(b"/") or (target == b"*" and method == b"OPTIONS"):
        if b"#" in target:
            raise HeadError("target has a fragment")
        return target, authority
    absolute = _ABSOLUTE.fullmatch(target)
    if absolute is None or absolute[1].lower() not in {b"http", b"https"}:
        raise HeadError("target is no path and no http URL")
    if absolute[2].lower() != authority.lower():
        raise HeadError("Host contradicts the target")
    rest = absolute[3]
    return (rest if rest.startswith(b"/") else b"/" + rest), authority


def _tokens(values: list[bytes] | tuple[bytes, ...]) -> set[bytes]:
    """The members of a list such as the value of Connection, in lower case."""
    if not values:
        return set()
    return {token for value in values for part in value.split(b",") if (token := part.strip(b" \t").lower())}


def _keeps_alive(minor: int, connection: set[bytes]) -> bool:
    return b"close" not in connection and (minor == 1 or b"keep-alive" in connection)


def _upgrade(
    method: bytes, minor: int, body_length: int | None, connection: set[bytes], values: list[bytes] | tuple[()]
) -> bytes:
    """The protocol that a request wants to change to, such as `websocket`. Only what can be relayed as it is counts:
    one token, GET, HTTP/1.1, no body, and never h2c. Anything else is a request without an upgrade (RFC 9110 §7.8).
    """
    if len(values) != 1 or b"upgrade" not in connection or method != b"GET" or minor == 0 or body_length != 0:
        return b""
    protocol = values[0]
    return protocol if protocol.lower() != b"h2c" and _TOKEN.fullmatch(protocol) else b""
