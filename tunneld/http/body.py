"""Reads the body of a request, bounded in size and time."""

from __future__ import annotations

from contextlib import aclosing
from http import HTTPStatus

import trio
from starlette.requests import ClientDisconnect, Request

from tunneld.http.problems import HttpError, http_error


async def read_body(request: Request, max_body: int, read_timeout: float) -> bytes:
    """Read the body: at most `max_body` bytes in at most `read_timeout` seconds; no more than that is held in memory.

    Raises `HttpError`: 413 if the body or its Content-Length is larger, 408 if it is late, 400 if the client left.
    """
    if _content_length(request) > max_body:
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
        raise http_error(HTTPStatus.REQUEST_TIMEOUT, detail, Connection="close") from None
    except ClientDisconnect:
        raise http_error(HTTPStatus.BAD_REQUEST, "the connection ended before the end of the body") from None
    return bytes(body)


def _content_length(request: Request) -> int:
    """The Content-Length, 0 if there is none. The HTTP server has checked that it is a number."""
    return int(request.headers.get("content-length", 0))


def _too_large(max_body: int) -> HttpError:
    detail = f"the body is larger than {max_body} bytes (http.max_body)"
    return http_error(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, detail, Connection="close")
