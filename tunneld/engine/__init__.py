"""The data plane: it relays bytes between two ends. `new_engine` makes the engine for this system.

The contract
    engine          `Engine`, `Relay`, `Limiter` and how a relay ends; both engines keep it
    limits          sizes and times, each with its reason
    handover        the state of a relay that moves to another engine or process
    failures        reports bugs, shortages and resets

Linux: one Trio task over one epoll set
    pump            the event loop and its handlers
    timers          deadlines
    acceptor        listeners and parked connections; descriptors that visitors do not get
    relay           what the relays in the pump have in common
    socket_relay    two sockets: one object for the relay ...
    socket_flow     ... and one for each direction (`recv`/`send`, or `splice`)
    pipes           the pipes that `splice` borrows
    throttle        bandwidth and quota

One side is no plain socket (Linux)
    end             a byte stream in the pump: a channel of a carrier, or `tls_end`
    tls_end         a TLS connection as an end
    end_relay       an end joined to a socket
    end_stream      an end as a Trio stream

Any other system: Trio tasks
    portable        the engine
    copy            two streams joined by two tasks
"""

from __future__ import annotations

import sys
from typing import Any

from tunneld.engine.engine import Engine
from tunneld.engine.limits import EngineLimits


def new_engine(**limits: Any) -> Engine:
    """Return the best engine for this system; `limits` are fields of `EngineLimits`. It serves while `run` runs."""
    if sys.platform == "linux":  # pump.py cannot even be imported without epoll and splice
        from tunneld.engine.pump import Pump as NativeEngine  # noqa: PLC0415
    else:
        from tunneld.engine.portable import PortableEngine as NativeEngine  # noqa: PLC0415
    return NativeEngine(EngineLimits(**limits))
