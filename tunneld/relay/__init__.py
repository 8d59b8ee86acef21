"""The data plane: everything that moves bytes from one connection to another.

new_engine(...)          -> the engine of this system: the pump on Linux, Trio tasks elsewhere
relay(a, b, linger=...)  -> join two Trio streams until both directions ended
"""

from __future__ import annotations

import sys
from typing import Any

from .engine import Cause, Engine, FailureCallback, Registration, Relay, RelayEnd, Side
from .limits import EngineLimits
from .streams import relay

__all__ = [
    "Cause",
    "Engine",
    "EngineLimits",
    "FailureCallback",
    "Registration",
    "Relay",
    "RelayEnd",
    "Side",
    "new_engine",
    "relay",
]


def new_engine(**limits: Any) -> Engine:
    """The best engine for this system; `limits` are the fields of `EngineLimits`. It serves once its `run` does."""
    if sys.platform == "linux":  # pump.py needs epoll and splice even to be imported
        from .pump import Pump as NativeEngine  # noqa: PLC0415
    else:
        from .portable import PortableEngine as NativeEngine  # noqa: PLC0415
    return NativeEngine(EngineLimits(**limits))
