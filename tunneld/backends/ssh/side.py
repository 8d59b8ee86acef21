"""The server side of the SSH backend: a stock `ssh -R` is all that the hidden server needs.

    KeyRegistry                 which server side has which key
    └─ SshServerSide ×tunnel    ssh://KEY@HOST:PORT; a visitor goes to its least loaded forward
       └─ Forward ×N            one `-R` of an SSH connection; see forwards.py

A client that connects with the key as its user name needs no other authentication, and the first `-R` of its connection
serves this tunnel. This file does not import asyncssh, which takes half a second: every relay has the backend, but not
every relay serves SSH.
"""

from __future__ import annotations

from typing import ClassVar

from tunneld.backends.mux_side import MuxServerSide
from tunneld.tunnel.keys import KeyRegistry


class SshServerSide(MuxServerSide):
    """The forwards of one tunnel, at `ssh://KEY@HOST:PORT`."""

    backend: ClassVar[str] = "ssh"


def find_side(registry: KeyRegistry, key: str) -> SshServerSide | None:
    """The server side with this key; None if no open ssh tunnel has it."""
    side = registry.find(key)
    return side if isinstance(side, SshServerSide) else None
