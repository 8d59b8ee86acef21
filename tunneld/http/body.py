"""The body of a request: whole, small and soon, or not at all."""

from __future__ import annotations

from contextlib import aclosing
from http import HTTPStatus

import trio
from starlette.requests import ClientDisconnect, Request

from tunneld.http.problems import refuse


async def read_body(request: Request, max_body: int, read_timeout: float) -> bytes:
    """Read the body, at most `max_body` octets in at most `read_timeout` seconds; no more than that is ever held.

    Raises `Refused`: 413, also for a body that only announces to be larger, 408, or 400 where the client went away.
    """
    if _announced(request) > max_body:
        raise _too_large(max_body)
    body = bytearray()
    try:
        with trio.fail_after(read_timeout):
            async with aclosing(request.stream()) as chunks:
                async for chunk in chunks:
                    if len(body) + len(chunk) > max_body:
                        raise _too_large(max_body)
                    body += chunk
    except trio.TooSlowError:
        detail = f"the body did not arrive within {read_timeout:g} s (http.read_timeout)"
        raise refuse(HTTPStatus.REQUEST_TIMEOUT, detail, Connection="close") from None
    except ClientDisconnect:
        raise refuse(HTTPStatus.BAD_REQUEST, "the connection ended in the middle of the body") from None
    return bytes(body)


def _announced(request: Request) -> int:
    """The Content-Length, which the HTTP server has checked to be a number."""
    return int(request.headers.get("content-length", 0))


def _too_large(max_body: int) -> Exception:
    detail = f"the body is larger than {max_body} octets (http.max_body)"
    return refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, detail, Connection="close")
