"""Compiles the modules that every byte and every visitor passes through, if `TUNNELD_COMPILE=1` is set. All other
settings of the package are in pyproject.toml.

mypyc, which comes with mypy, turns these modules into extension modules; the same files run without it, too. Anything
that passes `mypy --strict` can be compiled. Use `make wheel`, which needs a C compiler and the headers of Python.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from setuptools import setup

HOT = {
    "net": "dial liveness",
    "wire/webmux": "*",
    "wire/egtp": "delivery envelope fast frames streams",
    "wire": "chunked http1 proxy_protocol",
    "engine": (
        "acceptor budget end end_flow engine events failures flow flows handover limits pipes plain_transport portable"
        " pump relay scheduler socket_end socket_flow socket_to_end stream_end tapped throttle timers tls_end"
        " tls_over_end vanished"
    ),
    "mux": (
        "carrier channel channel_table connection end_connection heartbeat limits ping send_buffer transport turns"
        " webmux_channel window"
    ),
    "egtp": "attachment carrier channel link output",
    "sites": "body connection deadline end_owner endings fields heads input stream",
    "tunnel": "keys server_side servers tunnel visitor visitors waiting",
    "tunnel/ingress": "host ingress port proxy_header",
    "backends": "egtp keyed mux_side parked queue tcp webmux webmux_shared",
    "backends/ssh": "forwarded side",
    "agent": "agent_carrier association associations end_visitor local retiring source visitors",
}
"""Compiled modules by package: those with a cost per byte or per visitor. Code that mostly awaits gains nothing, but a
subclass of a compiled class must be compiled, too.
"""


def hot_files() -> list[str]:
    """Return the paths of the files to compile."""
    return [
        str(path)
        for package, modules in HOT.items()
        for module in modules.split()
        for path in sorted(Path("tunneld", package).glob(f"{module}.py"))
    ]


def extensions() -> list[Any]:
    """Return the extension modules; empty unless TUNNELD_COMPILE=1. TUNNELD_OPTIMIZE is the level for the C compiler, 3
    without it.
    """
    if os.environ.get("TUNNELD_COMPILE") != "1":
        return []
    from mypyc.build import mypycify  # noqa: PLC0415 - a build dependency only then

    return mypycify(hot_files(), debug_level="0", opt_level=os.environ.get("TUNNELD_OPTIMIZE", "3"))


setup(ext_modules=extensions())
