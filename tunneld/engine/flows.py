"""Which flow moves the bytes, by the kinds of source and target: the one table of fast paths.

    source       target       flow          how
    socket       socket       SocketFlow    `recv` and `send` through the pump's buffer; `splice` in bulk
    socket       buffered     SocketToEnd   `recv` into the pump's buffer, and straight on: encrypted or framed
    buffered     socket       EndToSocket   `send` of the bytes as they lie in the carrier's buffer
    buffered     buffered     EndToEnd      the same, without a system call

A new kind of end needs no entry: it is a `BufferedEnd`, and `EndToEnd` joins any two of them.
"""

from __future__ import annotations

from tunneld.engine.end_flow import EndToEnd, EndToSocket, SocketToEnd
from tunneld.engine.flow import Flow
from tunneld.engine.socket_flow import SocketFlow

FLOWS: dict[tuple[bool, bool], type[Flow]] = {
    (True, True): SocketFlow,
    (True, False): SocketToEnd,
    (False, True): EndToSocket,
    (False, False): EndToEnd,
}
"""By whether the source and the target are a `SocketEnd`."""
