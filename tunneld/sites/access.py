"""Access to a site: what is read from a request, which answer it gets, and what is remembered. Pure.

Decisions that take time, such as the check of a password, are in `guard`.
"""

from __future__ import annotations

import binascii
from base64 import b64decode

from tunneld.net.endpoint import Peer
from tunneld.policy.networks import read_address
from tunneld.sites.pages import error_page, redirect
from tunneld.sites.site import Request
from tunneld.wire.http1 import Fields


def field_values(fields: Fields, name: bytes) -> list[bytes]:
    """The values of all fields with this name, in lower case."""
    return [value for key, value in fields if len(key) == len(name) and key.lower() == name]


def basic_login(value: bytes) -> tuple[str, str] | None:
    """The user name and the password in an Authorization field of the scheme Basic (RFC 7617)."""
    scheme, _, encoded = value.partition(b" ")
    if scheme.lower() != b"basic":
        return None
    try:
        text = b64decode(encoded.strip(), validate=True).decode("utf-8", "surrogateescape")
    except binascii.Error:
        return None
    user, colon, password = text.partition(":")
    return (user, password) if colon else None


def source_of(client: Peer) -> int:
    """The source of a visitor: its IPv4 address or IPv6 /64."""
    return read_address(client[0]).source


def refused(request: Request, status: int, *extra: tuple[bytes, bytes]) -> bytes:
    """The relay's answer to a request that may not pass."""
    return error_page(status, request.head, request.identity, keep_alive=request.keep_alive, extra=extra)


def moved(request: Request, location: bytes, *extra: tuple[bytes, bytes]) -> bytes:
    """303: the same page under another address."""
    return redirect(303, request.head, location, request.identity, keep_alive=request.keep_alive, extra=extra)


def login_required(request: Request, realm: str) -> bytes:
    """401: browsers ask for a user name and a password."""
    challenge = f'Basic realm="{realm}", charset="UTF-8"'.encode()
    return refused(request, 401, (b"WWW-Authenticate", challenge))


def too_many(request: Request, seconds: float) -> bytes:
    """429, with the time after which another attempt makes sense."""
    return refused(request, 429, (b"Retry-After", b"%d" % max(1, round(seconds))))
