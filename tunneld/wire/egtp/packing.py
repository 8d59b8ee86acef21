"""Compression of the mojo message inside an envelope: zlib, at level 3 as in the original. Pure.

A message that does not inflate is used as it is: the original does so, and a mencoded message can never be mistaken for
compressed data (it begins with `(4`, which as a zlib header would ask for a preset dictionary). Inflation stops at
4 MiB, so a small envelope cannot fill the memory.
"""

from __future__ import annotations

import zlib

from tunneld.errors import RemoteProtocolError
from tunneld.wire.egtp.frames import MAX_MESSAGE
from tunneld.wire.egtp.steps import PIECE, Steps, finish

LEVEL = 3


def deflate(message: bytes) -> bytes:
    """Compress a message."""
    return finish(deflating(message))


def deflating(message: bytes) -> Steps[bytes]:
    """`deflate` in steps."""
    compressor, pieces = zlib.compressobj(LEVEL), []
    for start in range(0, len(message), PIECE):
        piece = message[start : start + PIECE]
        pieces.append(compressor.compress(piece))
        yield len(piece)
    return b"".join([*pieces, compressor.flush()])


def inflate(packed: bytes, limit: int = MAX_MESSAGE) -> bytes:
    """Decompress a message; one that is not compressed, or cut, is returned as it is. Octets after the compressed data
    are ignored. Raises `RemoteProtocolError` for a message of more than `limit` bytes.
    """
    decompressor = zlib.decompressobj()
    try:
        message = decompressor.decompress(packed, limit + 1)
        if len(message) <= limit and not decompressor.eof:
            return packed
    except zlib.error:
        return packed
    if len(message) > limit:
        raise RemoteProtocolError(f"EGTP message is larger than {limit} bytes after decompression")
    return message
