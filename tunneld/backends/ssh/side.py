"""The SSH backend: a stock `ssh -R` is all that the hidden server needs.

    Endpoints                       the shared port's book: which server side has which key
    └─ Ssh ×tunnel                  ssh://KEY@HOST:PORT; its forwards, the least loaded of which takes a visitor
       └─ Forward ×N                one `-R` of an SSH connection; see tunneld/ssh/

Whoever connects with the key as the user's name needs no other proof, and the first `-R` of that connection is this
tunnel. Nothing here knows more of SSH than that.
"""

from __future__ import annotations

from typing import ClassVar

from tunneld.backends.mux_side import MuxServerSide
from tunneld.tunnel.keys import KeyRegistry


class SshServerSide(MuxServerSide):
    """The forwards of one tunnel, at `ssh://KEY@HOST:PORT`."""

    backend: ClassVar[str] = "ssh"


def find_side(endpoints: KeyRegistry, key: str) -> SshServerSide | None:
    """Whose key this is."""
    side = endpoints.find(key)
    return side if isinstance(side, SshServerSide) else None
