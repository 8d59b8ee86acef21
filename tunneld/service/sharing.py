"""Several agents behind one name: whether what one of them asks for agrees with the tunnel that the others serve."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from tunneld.errors import UsageError
from tunneld.rules.options import TunnelOptions
from tunneld.tunnel import Tunnel

FREE = frozenset({"name", "client_port", "replace", "ttl"})
"""Options that are looked at otherwise, or not at all: agents count their ttl down, and the first one's holds."""


def check_agrees(tunnel: Tunnel, backend: str, options: TunnelOptions, asked: TunnelOptions) -> None:
    """Raise `UsageError` where an option that was `asked` for contradicts those of the open tunnel. `options` is what a
    grant made of them; one that was left out agrees with everything.
    """
    theirs, nothing = tunnel.opening.options, TunnelOptions()
    if backend != tunnel.opening.backend:
        raise _contradiction(tunnel, f"backend {tunnel.opening.backend}", f"backend {backend}")
    port = tunnel.client_uri.port
    if asked.client_port not in {None, port}:
        raise _contradiction(tunnel, f"client_port={port}", f"client_port={asked.client_port}")
    for field in fields(asked):
        name = field.name
        if name in FREE or getattr(asked, name) == getattr(nothing, name):
            continue
        wanted, there = getattr(options, name), getattr(theirs, name)
        if wanted != there:
            raise _contradiction(
                tunnel, f"{name}={_shown(there)}" if there else f"no {name}", f"{name}={_shown(wanted)}"
            )


def _contradiction(tunnel: Tunnel, there: str, wanted: str) -> UsageError:
    name = tunnel.opening.options.name
    return UsageError(
        f"tunnel {name!r} is shared and open with {there}, which {wanted} contradicts: ask for the same or leave it out"
    )


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
