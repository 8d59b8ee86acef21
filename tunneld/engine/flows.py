"""Which flow moves the bytes, by the kinds of source and target: the one table of fast paths.

    source       target       flow          how
    socket       socket       SocketFlow    `recv` and `send` through the pump's buffer; `splice` in bulk
    socket       buffered     SocketToEnd   `recv` into the pump's buffer, and straight on: encrypted or framed
    buffered     socket       EndToSocket   `send` of the bytes as they lie in the carrier's buffer
    buffered     buffered     EndToEnd      the same, without a system call

An end above a plain socket takes pipes, too. A new kind of end needs no entry: `EndToEnd` joins any `BufferedEnd`s.
"""

from __future__ import annotations

from typing import Any

from tunneld.engine.end_flow import EndToEnd, EndToSocket
from tunneld.engine.flow import Flow
from tunneld.engine.socket_flow import SocketFlow
from tunneld.engine.socket_to_end import SocketToEnd

AnyFlow = type[Flow[Any, Any]]

FLOWS: dict[tuple[bool, bool], tuple[AnyFlow, AnyFlow]] = {
    (True, True): (SocketFlow, SocketFlow),
    (True, False): (SocketToEnd, EndToSocket),
    (False, True): (EndToSocket, SocketToEnd),
    (False, False): (EndToEnd, EndToEnd),
}
"""The flows of both directions, by whether the source of the first one and its target are a `SocketEnd`."""
