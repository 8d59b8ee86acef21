"""Asks an authentication server whether a request may pass: `forward_auth`, as oauth2-proxy and Authelia answer it.

    GET /verify HTTP/1.0                          2xx         the request passes, with the fields that are listed
    Host: auth.example.org                        3xx, 4xx    the visitor gets this answer: often a redirection to the
    X-Forwarded-Method, -Proto, -Host, -Uri, -For             login page
    Cookie, Authorization, Accept, ...            otherwise   502, and 503 while too many are asked: nothing passes

Only the head of a request is told. The URL is one of the operator's (`names.forward_auth`): a tenant who could name any
URL would make the relay connect to addresses that only the relay can reach, and would get the cookies of visitors. No
redirection is followed for the same reason.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass

import trio

from tunneld.errors import reason_of
from tunneld.policy.site_rules import AuthUrl
from tunneld.sites.access import field_values
from tunneld.sites.fields import FieldLines, Passage
from tunneld.sites.site import Request
from tunneld.wire.http1 import HeadError, ResponseHead, find_head, forwarded_fields, parse_response

MAX_ANSWER_HEAD = 32 * 1024
"""Bytes: a server may set several large cookies."""

MAX_ANSWER_BODY = 64 * 1024
"""Bytes of an answer that is passed on: a page that says why. A login page is another site, reached by redirection."""

ASKED_WITH = (b"cookie", b"authorization", b"accept", b"accept-language", b"user-agent", b"origin", b"referer")
"""Fields of the visitor that the authentication server sees."""


class AskFailedError(Exception):
    """There is no answer to pass on. The message is the reason, for the log."""


@dataclass(frozen=True, slots=True)
class AuthAnswer:
    """What an authentication server answered."""

    status: int
    fields: FieldLines  # without the ones of the connection
    body: bytes

    @property
    def permits(self) -> bool:
        """Whether the request may pass."""
        return 200 <= self.status < 300

    def passage(self, names: frozenset[bytes]) -> Passage:
        """The request that passes gets the fields with these `names`, and loses its own. Cookies go to the visitor."""
        return Passage(
            removed=names,
            added=tuple((name, value) for name, value in self.fields if name.lower() in names),
            added_to_response=tuple(field for field in self.fields if field[0].lower() == b"set-cookie"),
        )

    def response(self, request: Request) -> bytes:
        """The answer for the visitor. Raises `AskFailedError` where it is none."""
        if not 300 <= self.status < 500:
            raise AskFailedError(f"the authentication server answered {self.status}")
        kept = [
            (name, value) for name, value in self.fields if name.lower() not in {b"content-length", b"x-request-id"}
        ]
        kept += [(b"X-Request-Id", request.identity), (b"Content-Length", b"%d" % len(self.body))]
        kept.append((b"Connection", b"keep-alive" if request.keep_alive else b"close"))
        lines = [b"HTTP/1.1 %d \r\n" % self.status, *(b"%b: %b\r\n" % field for field in kept), b"\r\n"]
        return b"".join([*lines, b"" if request.head.method == b"HEAD" else self.body])


def question(url: AuthUrl, request: Request, host: bytes) -> bytes:
    """The head of the request to the authentication server. HTTP/1.0, as nginx asks: the answer is never chunked."""
    head = request.head
    fields = [
        (b"Host", url.authority),
        (b"X-Forwarded-Method", head.method),
        (b"X-Forwarded-Proto", b"https" if request.is_secure else b"http"),
        (b"X-Forwarded-Host", host),
        (b"X-Forwarded-Uri", head.target),
        (b"X-Forwarded-For", request.client[0].encode()),
        (b"X-Request-Id", request.identity),
        *((name, value) for name, value in head.fields if name.lower() in ASKED_WITH),
        (b"Connection", b"close"),
    ]
    return b"".join([b"GET %b HTTP/1.0\r\n" % url.target, *(b"%b: %b\r\n" % field for field in fields), b"\r\n"])


def cache_key(request: Request) -> tuple[bytes, ...]:
    """All that an answer may depend on."""
    head = request.head
    secrets = [value for name in (b"cookie", b"authorization") for value in (b"", *field_values(head.fields, name))]
    return (head.method, head.authority, head.target, request.client[0].encode(), *secrets)


async def ask(url: AuthUrl, request: Request, context: ssl.SSLContext) -> AuthAnswer:
    """Ask. Raises `AskFailedError`; the caller has a deadline. `context` verifies the server of an https URL."""
    try:
        stream: trio.abc.Stream = await trio.open_tcp_stream(url.host, url.port)
        if url.secure:
            stream = trio.SSLStream(stream, context, server_hostname=url.host, https_compatible=True)
        try:
            await stream.send_all(question(url, request, request.head.authority))
            return await _read_answer(stream)
        finally:
            await trio.aclose_forcefully(stream)
    except HeadError as error:
        raise AskFailedError(f"the authentication server's answer is malformed: {error}") from None
    except (OSError, UnicodeError, trio.BrokenResourceError) as error:
        reason = reason_of(error) if isinstance(error, OSError) else str(error.__cause__ or error)
        raise AskFailedError(f"the authentication server cannot be reached: {reason}") from None


async def _read_answer(stream: trio.abc.Stream) -> AuthAnswer:
    data = bytearray()
    while True:
        if not (size := find_head(data, MAX_ANSWER_HEAD)):
            data += await _more(stream)
            continue
        head = parse_response(bytes(data[:size]), b"GET")
        del data[:size]
        if head.status == 101:
            raise AskFailedError("the authentication server answered 101")
        if not head.is_interim:
            break
    fields = tuple(forwarded_fields(head.fields))
    is_wanted = not 200 <= head.status < 300
    return AuthAnswer(head.status, fields, await _read_body(stream, head, data) if is_wanted else b"")


async def _read_body(stream: trio.abc.Stream, head: ResponseHead, body: bytearray) -> bytes:
    """Read the body, of which some bytes are here already."""
    if head.is_chunked:
        raise AskFailedError("the authentication server's answer is chunked, which a request of HTTP/1.0 excludes")
    length = None if head.until_close else head.body_length or 0
    while length is None or len(body) < length:
        if len(body) > MAX_ANSWER_BODY or (length or 0) > MAX_ANSWER_BODY:
            raise AskFailedError(f"the authentication server's answer exceeds {MAX_ANSWER_BODY} bytes")
        chunk = await stream.receive_some()
        if not chunk and length is not None:
            raise AskFailedError("the authentication server's answer is incomplete")
        if not chunk:
            break
        body += chunk
    return bytes(body[:length])


async def _more(stream: trio.abc.Stream) -> bytes:
    chunk = bytes(await stream.receive_some())
    if not chunk:
        raise AskFailedError("the authentication server closed the connection without an answer")
    return chunk
