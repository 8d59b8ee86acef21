"""The heads of one connection, read and written. Clients and servers repeat themselves, so the last one is remembered.

A head that equals the one before it byte by byte is not parsed again. Nor are the fields of a request that differs in
its target alone, as the requests of a program do. What was read, and what was written for it, is the same then, but for
the id of the request. A longer head than `MAX_REMEMBERED` is parsed each time, so an idle connection keeps little.
"""

from __future__ import annotations

import re

from tunneld.sites.fields import HostRewrite, Origin, Passage, given_id, new_id, request_fields, response_fields
from tunneld.wire.http1 import (
    MAX_TARGET_BYTES,
    Fields,
    HeadError,
    RequestHead,
    ResponseHead,
    encode_request,
    encode_response,
    find_head,
    parse_request,
    parse_response,
    skip_empty_lines,
)

MAX_REMEMBERED = 2048
"""Bytes of a head: those of browsers have up to 1500."""

_PLAIN_LINE = re.compile(rb"([A-Z]+) (/[!$-~]*) HTTP/1\.([01])\r\n")
"""A request line with a target that needs no second look: llhttp accepts all of these bytes, and none of them is `#`.
"""


class RequestReader:
    """Takes the heads of requests out of a buffer."""

    __slots__ = ("_fields", "_head", "_raw")

    def __init__(self) -> None:
        self._raw = b""  # the last head
        self._fields = b""  # the part of it behind the request line
        self._head: RequestHead | None = None

    def repeated(self, data: memoryview) -> RequestHead | None:
        """The last head, if `data` is the same once more and nothing else."""
        raw = self._raw
        return self._head if len(data) == len(raw) and bytes(data) == raw else None

    def take(self, data: bytearray, max_head: int) -> RequestHead | None:
        """Take a head, if it is complete. Raises `HeadError`."""
        raw = self._raw
        if raw and data.startswith(raw):
            del data[: len(raw)]
            return self._head
        if data.startswith(b"\r\n"):
            empty = skip_empty_lines(data)
            del data[:empty]
        size = find_head(data, max_head)
        if not size:
            return None
        raw = bytes(data[:size])
        del data[:size]
        line = raw.find(b"\r\n") + 2
        head = self._with_known_fields(raw, line) or parse_request(raw)
        if size <= MAX_REMEMBERED:
            self._raw, self._fields, self._head = raw, raw[line:], head
        return head

    def _with_known_fields(self, raw: bytes, line: int) -> RequestHead | None:
        """The head, where only its target is not known yet."""
        last = self._head
        if last is None or raw[line:] != self._fields or (found := _PLAIN_LINE.match(raw)) is None:
            return None
        method, target, minor = found.groups()
        if method != last.method or minor != b"%d" % last.minor_version or len(target) > MAX_TARGET_BYTES:
            return None
        return RequestHead(
            method, target, last.minor_version, last.authority, last.host, last.fields, last.body_length,
            last.keep_alive, last.upgrade, last.expects_continue,
        )  # fmt: skip


class ResponseReader:
    """Collects the heads of responses."""

    __slots__ = ("_head", "_method", "_partial", "_raw")

    def __init__(self) -> None:
        self._partial = bytearray()  # of a head, incomplete
        self._raw = b""  # the last head of a final response
        self._method = b""  # of its request
        self._head: ResponseHead | None = None

    def take(self, data: memoryview, request: RequestHead, max_head: int) -> tuple[int, ResponseHead | None]:
        """Take bytes of the head of the response to `request`: return how many, and the head if it is complete. Raises
        `HeadError`.
        """
        raw, partial = self._raw, self._partial
        if raw and not partial and request.method == self._method and bytes(data[: len(raw)]) == raw:
            return len(raw), self._head
        had = len(partial)
        partial += data[: max_head + 4 - had]
        size = find_head(partial, max_head)
        if not size:
            return len(partial) - had, None
        raw = bytes(partial[:size])
        partial.clear()
        head = parse_response(raw, request.method)
        if head.status == 101 and not request.upgrade:
            raise HeadError("101 without a request to upgrade", 502)
        if head.status >= 200 and size <= MAX_REMEMBERED:
            self._raw, self._method, self._head = raw, request.method, head
        return size - had, head


class HeadWriter:
    """Writes the heads of one visitor's connection for the next hop."""

    __slots__ = (
        "_given", "_identified", "_origin", "_passage", "_request", "_request_fields", "_response", "_response_head",
        "_response_key", "_rewrite",
    )  # fmt: skip

    def __init__(self, origin: Origin) -> None:
        self._origin = origin
        self._identified: Fields | None = None  # the fields of the last request; the same list if they are the same
        self._given = b""  # the id in them
        self._request_fields: Fields | None = None  # the last ones that were written
        self._rewrite: HostRewrite | None = None  # by which, and by this one
        self._passage: Passage | None = None
        self._request = b""  # the result, without the request line and the id
        self._response_head: ResponseHead | None = None
        self._response_key: tuple[Fields, Passage | None, bool] | None = None  # what else determines a response
        self._response = b""

    def identity(self, head: RequestHead) -> bytes:
        """The id of a request."""
        if head.fields is not self._identified:
            self._given = given_id(head)
            self._identified = head.fields
        return self._given or new_id()

    def request(
        self, head: RequestHead, identity: bytes, rewrite: HostRewrite | None, passage: Passage | None = None
    ) -> bytes:
        """The head of a request for the hidden server. `identity` is the id of the request."""
        if head.fields is not self._request_fields or rewrite is not self._rewrite or passage is not self._passage:
            fields = request_fields(head, self._origin, rewrite)
            written = encode_request(head, fields if passage is None else passage.of_request(fields))
            line = written.index(b"\r\n")
            self._request = written[line:-2]
            self._request_fields, self._rewrite, self._passage = head.fields, rewrite, passage
        return b"%b %b HTTP/1.%d%bX-Request-Id: %b\r\n\r\n" % (
            head.method, head.target, head.minor_version, self._request, identity,
        )  # fmt: skip

    def response(
        self,
        head: ResponseHead,
        request: RequestHead,
        identity: bytes,
        rewrite: HostRewrite | None,
        passage: Passage | None = None,
        *,
        keep_alive: bool,
    ) -> bytes:
        """The head of a response for the visitor. `keep_alive` tells whether its connection stays open."""
        last = self._response_key
        if (
            head is not self._response_head
            or last is None
            or last[0] is not request.fields
            or last[1] is not passage
            or last[2] != keep_alive
        ):
            fields = response_fields(head, request, self._origin, rewrite)
            if passage is not None and not head.is_interim:
                fields = passage.of_response(fields)
            self._response = encode_response(head, fields, request, keep_alive=keep_alive)[:-2]
            self._response_head, self._response_key = head, (request.fields, passage, keep_alive)
        if head.is_interim:
            return self._response + b"\r\n"
        return b"%bX-Request-Id: %b\r\n\r\n" % (self._response, identity)
