"""What a `RequestStream` calls: the connection of the visitor whose requests are in it."""

from __future__ import annotations

from typing import Protocol

from tunneld.wire.http1 import ResponseHead


class ResponseReceiver(Protocol):
    """What a stream calls: the visitor's connection."""

    max_head: int  # bytes of a response head

    def on_requests_taken(self) -> None:
        """The hidden server has taken what was buffered in the stream."""

    def on_response_head(self, response: ResponseHead, data: bytes | bytearray | memoryview) -> None:
        """A head, perhaps an interim one, and what came of the body in the same read. Valid only during the call."""

    def on_response_data(self, data: bytes | bytearray | memoryview) -> None:
        """More of the body, at most the `send_capacity` of the visitor's end. Valid only during the call."""

    def on_response_spliced(self, count: int) -> None:
        """More of the body went to the visitor in a pipe."""

    def on_response_complete(self) -> None:
        """The response is complete."""

    def on_stream_over(self, reason: str) -> None:
        """The stream has ended without being told to `leave`; the response to the request under way will not come, or
        not all of it.
        """


class UpgradedReceiver(Protocol):
    """The same after an upgrade."""

    def on_requests_taken(self) -> None:
        """See `ResponseReceiver.on_requests_taken`."""

    def on_response_data(self, data: memoryview) -> None:
        """Bytes for the visitor, at most `send_capacity`."""

    def on_response_spliced(self, count: int) -> None:
        """Bytes went to the visitor in a pipe."""

    def on_finished(self) -> None:
        """The hidden server sends no more."""

    def on_stream_over(self, reason: str) -> None:
        """The relay has cut the stream; or, with an empty reason, both directions are finished."""
