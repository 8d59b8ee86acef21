"""The protocol of a connection to the shared HTTPS port, told by its first bytes. Pure.

    0x16             TLS: a ClientHello follows, see client_hello.py
    SSH-             the version of an SSH client, which it sends without waiting for the server's (RFC 4253 §4.2)
    A to Z           the method of a plain HTTP request
    anything else    nothing that is served

A PROXY protocol header in front of these is taken off before.
"""

from __future__ import annotations

from enum import Enum

from tunneld.wire.client_hello import ClientHello, parse_client_hello

_SSH = b"SSH-"


class PlainProtocol(Enum):
    """A protocol without TLS."""

    SSH = "ssh"
    HTTP = "http"


def read_first_bytes(data: bytes) -> ClientHello | PlainProtocol | None:
    """The protocol of a connection that begins with `data`, in TLS with the whole ClientHello; None if that takes more
    bytes. Raises `HelloError` where it is none of ours.
    """
    if data[:4] == _SSH:
        return PlainProtocol.SSH
    if data and _SSH.startswith(data):
        return None
    if b"A" <= data[:1] <= b"Z":
        return PlainProtocol.HTTP
    return parse_client_hello(data)
