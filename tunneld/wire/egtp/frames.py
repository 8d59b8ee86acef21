"""Frames of EGTP on a TCP connection: a length of four octets, most significant first, and the message. Pure.

There is no greeting and no keep-alive. Both directions of a connection carry independent frames; a response may come
back on the connection of its request. A frame of more than 4 MiB ends the connection.
"""

from __future__ import annotations

from struct import Struct

from tunneld.errors import LocalProtocolError, RemoteProtocolError

MAX_MESSAGE = 4 << 20
"""Octets of the largest message, as in the original."""

FIRST_PORT = 20001
"""Where nodes listen; the original counted up from here to a free port."""

_LENGTH = Struct("!I")


def pack_frame(message: bytes) -> bytes:
    """The frame of a message. Raises `LocalProtocolError` if the message is larger than `MAX_MESSAGE`."""
    if len(message) > MAX_MESSAGE:
        raise LocalProtocolError(f"message of {len(message)} bytes is larger than {MAX_MESSAGE} bytes")
    return _LENGTH.pack(len(message)) + message


class FrameReader:
    """Splits the input of a connection into messages.

    `feed` what was read, then call `next_message` until it returns None. A caller that reads only then holds at most
    one unfinished message and one read. No memory is taken on the word of a length: the buffer grows as octets arrive.
    `limit` may be raised later, when the peer has authenticated.
    """

    def __init__(self, limit: int = MAX_MESSAGE) -> None:
        self.limit = limit
        self._buffer = bytearray()

    def __len__(self) -> int:
        """Buffered bytes: at most one frame and one read."""
        return len(self._buffer)

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Add bytes that arrived."""
        self._buffer += data

    def next_message(self) -> bytes | None:
        """Remove and return the next complete message; None if there is none.

        Raises `RemoteProtocolError` if it is longer than the limit, as soon as its length is known; so does every later
        call.
        """
        if len(self._buffer) < _LENGTH.size:
            return None
        length: int = _LENGTH.unpack_from(self._buffer)[0]
        if length > self.limit:
            raise RemoteProtocolError(f"EGTP frame of {length} bytes is longer than {self.limit} bytes")
        end = _LENGTH.size + length
        if len(self._buffer) < end:
            return None
        message = bytes(self._buffer[_LENGTH.size : end])
        del self._buffer[:end]
        return message
