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

from tunneld.auth.http_question import AskFailedError, exchange, request_head
from tunneld.policy.site_rules import AuthUrl
from tunneld.sites.access import field_values
from tunneld.sites.fields import FieldLines, Passage
from tunneld.sites.site import Request

SERVER = "the authentication server"
"""Its name in messages."""

ASKED_WITH = (b"cookie", b"authorization", b"accept", b"accept-language", b"user-agent", b"origin", b"referer")
"""Fields of the visitor that the authentication server sees."""


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
            raise AskFailedError(f"{SERVER} answered {self.status}")
        kept = [
            (name, value) for name, value in self.fields if name.lower() not in {b"content-length", b"x-request-id"}
        ]
        kept += [(b"X-Request-Id", request.identity), (b"Content-Length", b"%d" % len(self.body))]
        kept.append((b"Connection", b"keep-alive" if request.keep_alive else b"close"))
        lines = [b"HTTP/1.1 %d \r\n" % self.status, *(b"%b: %b\r\n" % field for field in kept), b"\r\n"]
        return b"".join([*lines, b"" if request.head.method == b"HEAD" else self.body])


def question(url: AuthUrl, request: Request, host: bytes) -> bytes:
    """The head of the request to the authentication server."""
    head = request.head
    fields = [
        (b"X-Forwarded-Method", head.method),
        (b"X-Forwarded-Proto", b"https" if request.is_secure else b"http"),
        (b"X-Forwarded-Host", host),
        (b"X-Forwarded-Uri", head.target),
        (b"X-Forwarded-For", request.client[0].encode()),
        (b"X-Request-Id", request.identity),
        *((name, value) for name, value in head.fields if name.lower() in ASKED_WITH),
    ]
    return request_head(b"GET", url, fields)


def cache_key(request: Request) -> tuple[bytes, ...]:
    """All that an answer may depend on."""
    head = request.head
    secrets = [value for name in (b"cookie", b"authorization") for value in (b"", *field_values(head.fields, name))]
    return (head.method, head.authority, head.target, request.client[0].encode(), *secrets)


async def ask(url: AuthUrl, request: Request, context: ssl.SSLContext) -> AuthAnswer:
    """Ask. Raises `AskFailedError`; the caller has a deadline. `context` verifies the server of an https URL."""
    head = question(url, request, request.head.authority)
    answer = await exchange(url, head, context, SERVER, lambda status: not 200 <= status < 300)
    return AuthAnswer(answer.status, answer.fields, answer.body)
