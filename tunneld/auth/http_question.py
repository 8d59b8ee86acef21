"""Asks an HTTP server of the operator's one question. HTTP/1.0, as nginx asks authentication servers: the answer is
never chunked, and the connection is closed after it.

No redirection is followed. The whole exchange has no deadline of its own: the caller has one.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import trio

from tunneld.errors import reason_of
from tunneld.policy.site_rules import AuthUrl
from tunneld.wire.http1 import HeadError, ResponseHead, find_head, forwarded_fields, parse_response

MAX_ANSWER_HEAD = 32 * 1024
"""Bytes: a server may set several large cookies."""

MAX_ANSWER_BODY = 64 * 1024
"""Bytes: a page or a few fields that say why."""


class AskFailedError(Exception):
    """There is no answer. The message is the reason, for the log."""


@dataclass(frozen=True, slots=True)
class HttpAnswer:
    """What the server answered."""

    status: int
    fields: tuple[tuple[bytes, bytes], ...]  # without the ones of the connection
    body: bytes  # empty where it was not wanted


def always(_status: int) -> bool:
    """The body is wanted with every status."""
    return True


def request_head(method: bytes, url: AuthUrl, fields: Sequence[tuple[bytes, bytes]]) -> bytes:
    """The head of a request with these fields beside the ones of the connection."""
    fields = [(b"Host", url.authority), *fields, (b"Connection", b"close")]
    lines = (b"%b: %b\r\n" % field for field in fields)
    return b"".join([b"%b %b HTTP/1.0\r\n" % (method, url.target), *lines, b"\r\n"])


async def exchange(
    url: AuthUrl,
    request: bytes,
    context: ssl.SSLContext | None,
    server: str,
    is_body_wanted: Callable[[int], bool] = always,
) -> HttpAnswer:
    """Send a request and return the answer. Raises `AskFailedError`, with `server` as the name of the server in the
    message. `context` verifies the server of an https URL, and only that needs it; `is_body_wanted` is asked with the
    status.
    """
    try:
        stream: trio.abc.Stream = await trio.open_tcp_stream(url.host, url.port)
        if url.secure:
            assert context is not None
            stream = trio.SSLStream(stream, context, server_hostname=url.host, https_compatible=True)
        try:
            await stream.send_all(request)
            return await _read_answer(stream, server, is_body_wanted)
        finally:
            await trio.aclose_forcefully(stream)
    except HeadError as error:
        raise AskFailedError(f"the answer of {server} is malformed: {error}") from None
    except (OSError, UnicodeError, trio.BrokenResourceError) as error:
        reason = reason_of(error) if isinstance(error, OSError) else str(error.__cause__ or error)
        raise AskFailedError(f"{server} cannot be reached: {reason}") from None


async def _read_answer(stream: trio.abc.Stream, server: str, is_body_wanted: Callable[[int], bool]) -> HttpAnswer:
    data = bytearray()
    while True:
        if not (size := find_head(data, MAX_ANSWER_HEAD)):
            data += await _more(stream, server)
            continue
        head = parse_response(bytes(data[:size]), b"GET")
        del data[:size]
        if head.status == 101:
            raise AskFailedError(f"{server} answered 101")
        if not head.is_interim:
            break
    fields = tuple(forwarded_fields(head.fields))
    body = await _read_body(stream, server, head, data) if is_body_wanted(head.status) else b""
    return HttpAnswer(head.status, fields, body)


async def _read_body(stream: trio.abc.Stream, server: str, head: ResponseHead, body: bytearray) -> bytes:
    """Read the body, of which some bytes are here already."""
    if head.is_chunked:
        raise AskFailedError(f"the answer of {server} is chunked, which a request of HTTP/1.0 excludes")
    length = None if head.until_close else head.body_length or 0
    while length is None or len(body) < length:
        if len(body) > MAX_ANSWER_BODY or (length or 0) > MAX_ANSWER_BODY:
            raise AskFailedError(f"the answer of {server} exceeds {MAX_ANSWER_BODY} bytes")
        chunk = await stream.receive_some()
        if not chunk and length is not None:
            raise AskFailedError(f"the answer of {server} is incomplete")
        if not chunk:
            break
        body += chunk
    return bytes(body[:length])


async def _more(stream: trio.abc.Stream, server: str) -> bytes:
    chunk = bytes(await stream.receive_some())
    if not chunk:
        raise AskFailedError(f"{server} closed the connection without an answer")
    return chunk
