"""The data plane: it relays bytes between two ends. `new_engine` makes the one for this system.

engine        the contract of both engines
pump          Linux: one Trio task over one epoll set; `socket_relay` and `socket_flow` splice between two sockets
portable      any other system: two Trio tasks per relay
end           one side of a relay that is no plain socket: a channel, or a TLS connection (`tls_end`)
end_relay     an end joined to a socket
"""

from __future__ import annotations

import sys
from typing import Any

from tunneld.engine.engine import Engine
from tunneld.engine.limits import EngineLimits


def new_engine(**limits: Any) -> Engine:
    """The best engine for this system; `limits` are the fields of `EngineLimits`. It serves once its `run` does."""
    if sys.platform == "linux":  # pump.py needs epoll and splice even to be imported
        from tunneld.engine.pump import Pump as NativeEngine  # noqa: PLC0415
    else:
        from tunneld.engine.portable import PortableEngine as NativeEngine  # noqa: PLC0415
    return NativeEngine(EngineLimits(**limits))
