"""The answers that the relay itself gives to requests for a host name: errors, and redirections to https. Pure.

They reveal nothing about the hidden server and which names are in use for whom: a name that no tunnel has, and one
whose tunnel was closed for good, are the same 404. The owner of the tunnel reads the reason in the log and in
`tunnel show`.
"""

from __future__ import annotations

import html
from http import HTTPStatus

from tunneld.wire.http1 import RequestHead

RETRY_SECONDS = 2
"Seconds in Retry-After while nobody is connected for a name: an agent is back within that time after a short loss."

_TEXTS = {
    400: "The request is malformed.",
    401: "This page requires a user name and a password.",
    403: "You may not see this page.",
    404: "No site has this name here.",
    405: "This method is not available.",
    408: "The request did not arrive in time.",
    414: "The address is too long.",
    417: "The expectation of this request cannot be met.",
    421: "This connection was opened for another name. Open the page again.",
    429: "There were too many requests. Try again in a moment.",
    431: "The head of the request is too long. Deleting cookies may help.",
    501: "This method or transfer coding is not available.",
    502: "The site's server did not answer as expected.",
    503: "The site's server is not connected at the moment. Try again in a moment.",
    504: "The site's server did not answer in time.",
    505: "This version of HTTP is not available. Use HTTP/1.1.",
}

PLAIN_HTTP = (
    "This is the port for HTTPS, and the request was sent without TLS. Use an address that begins with https://."
)
"""The text of a 400."""

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>body{{font:1rem/1.5 system-ui,sans-serif;max-width:36rem;margin:15vh auto;padding:0 1rem}}
:root{{color-scheme:light dark}}small{{opacity:.7}}</style>
<h1>{title}</h1><p>{text}</p><p><small>Request {identity}</small></p></html>
"""


def error_page(
    status: int,
    request: RequestHead | None,
    identity: bytes,
    *,
    keep_alive: bool = False,
    extra: tuple[tuple[bytes, bytes], ...] = (),
    text: str = "",
) -> bytes:
    """A complete response. `request` is None where its head could not be read: the connection must be closed then.

    `identity` is the id of the request, `extra` are further fields, `text` replaces the usual text. A page for
    browsers, a line of text for programs.
    """
    title, text = f"{status} {HTTPStatus(status).phrase}", text or _TEXTS[status]
    wants_html = request is not None and any(
        name.lower() == b"accept" and b"text/html" in value for name, value in request.fields
    )
    if wants_html:
        body = _PAGE.format(
            title=title, text=html.escape(text), identity=html.escape(identity.decode("ascii"))
        ).encode()
        content_type = b"text/html; charset=utf-8"
    else:
        body = f"{title}\n{text}\nrequest {identity.decode('ascii')}\n".encode()
        content_type = b"text/plain; charset=utf-8"
    fields = [(b"Content-Type", content_type), (b"Cache-Control", b"no-store"), (b"Tunneld-Error", b"%d" % status)]
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        fields.append((b"Retry-After", b"%d" % RETRY_SECONDS))
    return _response(status, [*fields, (b"X-Request-Id", identity), *extra], body, request, keep_alive=keep_alive)


def https_redirect(request: RequestHead, port: int, identity: bytes, *, keep_alive: bool) -> bytes:
    """A redirection to the same address under https, on this port of the relay. 308: the method stays the same."""
    authority = request.host.encode() + (b"" if port == 443 else b":%d" % port)
    return redirect(308, request, b"https://" + authority + request.target, identity, keep_alive=keep_alive)


def redirect(
    status: int,
    request: RequestHead,
    location: bytes,
    identity: bytes,
    *,
    keep_alive: bool,
    extra: tuple[tuple[bytes, bytes], ...] = (),
) -> bytes:
    """A redirection to another address."""
    fields = [(b"Location", location), (b"X-Request-Id", identity), *extra]
    return _response(status, fields, b"", request, keep_alive=keep_alive)


def plain_response(body: bytes, request: RequestHead, *, keep_alive: bool) -> bytes:
    """A small file."""
    return _response(200, [(b"Content-Type", b"application/octet-stream")], body, request, keep_alive=keep_alive)


def _response(
    status: int, fields: list[tuple[bytes, bytes]], body: bytes, request: RequestHead | None, *, keep_alive: bool
) -> bytes:
    lines = [b"HTTP/1.1 %d %b\r\n" % (status, HTTPStatus(status).phrase.encode())]
    lines += [b"%b: %b\r\n" % field for field in fields]
    lines.append(b"Content-Length: %d\r\n" % len(body))
    if not keep_alive:
        lines.append(b"Connection: close\r\n")
    elif request is not None and request.minor_version == 0:
        lines.append(b"Connection: keep-alive\r\n")
    lines.append(b"\r\n")
    if request is None or request.method != b"HEAD":
        lines.append(body)
    return b"".join(lines)
