"""How visitors are turned away while the local server is unhealthy, or does not answer where it speaks HTTP."""

from __future__ import annotations

from contextlib import suppress

import trio

ANSWER = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: 46\r\n"
    b"Cache-Control: no-store\r\nRetry-After: 10\r\nConnection: close\r\n\r\n"
    b"The server behind this address is unavailable\n"
)
PATIENCE = 5.0
"""Seconds for a visitor to hear the answer. Closing at once would reset the connection of one who still asks, and a
reset drops the answer.
"""
MAX_ANSWERS = 256
"""Visitors who are being answered at once; further ones are closed. Of one relay no more can be waiting by default."""
CHUNK = 65536
"""Octets of a question read at once, for nobody."""


async def answer(stream: trio.abc.HalfCloseableStream) -> None:
    """Say that the server is unavailable, in bounded time, and close."""
    async with stream:
        with trio.move_on_after(PATIENCE), suppress(trio.BrokenResourceError):
            await stream.send_all(ANSWER)
            await stream.send_eof()
            while await stream.receive_some(CHUNK):
                pass
