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
    "wire/webmux": "*",
    "wire": "proxy_protocol",
    "relay": "acceptor engine failures flow lift limits look pair pipes pump room throttle timers",
    "session": "__init__ carrier channel duct heartbeat joint limits link outbox owner tls window",
    "backends": "*",
    "tunnel": "client_side tunnel visitors",
    "agent": "carriers dial local secured visitors ways",
}
"""By room. What costs by the byte or by the visitor, and no more: what awaits most of the time gains nothing."""


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
