"""Compiles what every byte and every visitor passes, where `TUNNELD_COMPILE=1` asks for it; everything else about the
package is in pyproject.toml.

mypyc, which comes with mypy, makes extension modules of the same files that run without it: what passes `mypy --strict`
is compiled as it stands. `make wheel` is the way to call it; a C compiler and Python's headers are needed.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from setuptools import setup

HOT = {
    "net": "dial",
    "wire/webmux": "*",
    "wire": "proxy_protocol",
    "engine": (
        "acceptor end end_relay engine failures handover limits pipes pump relay socket_flow socket_relay"
        " throttle timers tls_end"
    ),
    "mux": "carrier channel connection heartbeat limits ping send_buffer window",
    "tunnel": "client_side keys server_side tunnel visitors",
    "backends": "keyed mux_side queue tcp webmux",
    "backends/ssh": "side",
    "agent": "carriers end_visitor local source visitors",
}
"""By package. What costs by the byte or by the visitor, and no more: what awaits most of the time gains nothing."""


def hot_files() -> list[str]:
    """The files that are compiled."""
    return [
        str(path)
        for room, modules in HOT.items()
        for module in modules.split()
        for path in sorted(Path("tunneld", room).glob(f"{module}.py"))
    ]


def extensions() -> list[Any]:
    """The modules to compile; none unless asked for."""
    if os.environ.get("TUNNELD_COMPILE") != "1":
        return []
    from mypyc.build import mypycify  # noqa: PLC0415  # only there where it is asked for

    return mypycify(hot_files(), debug_level="0")


setup(ext_modules=extensions())
