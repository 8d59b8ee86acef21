"""tunneld: a self-hosted tunnel service on Trio. This is its library for Trio programs.

    async with tunneld.connect("relay.example.org:7010") as client:
        server_uri = await client.open_tunnel()
        client_uri = await client.get_tunnel_address(server_uri)

        async with tunneld.open_listener(client) as listener:
            await trio.serve_listeners(handler, [listener])

`Client.open_tunnel` is for a hidden server that connects by itself; `open_listener` makes this program the server.
`visit` connects to a private tunnel. All exceptions of tunneld are of the class `TunneldError`. The names in `__all__`
are the whole public interface.

A program on asyncio calls `openTunnel` and `getTunnelAddress` over XML-RPC, in a thread (`asyncio.to_thread`), starts
`tunnel expose` (`asyncio.create_subprocess_exec`), or runs Trio inside its loop (`trio.lowlevel.start_guest_run`).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tunneld.agent.listener import TunnelListener, VisitorStream, open_listener
    from tunneld.agent.visit import visit
    from tunneld.client import Client, connect
    from tunneld.errors import (
        ConfigError,
        LocalProtocolError,
        NotAllowedError,
        RefusedError,
        RelayUnreachableError,
        RemoteProtocolError,
        ShortageError,
        TunneldError,
        UsageError,
    )
    from tunneld.tls.contexts import client_tls_context

__all__ = [
    "Client",
    "ConfigError",
    "LocalProtocolError",
    "NotAllowedError",
    "RefusedError",
    "RelayUnreachableError",
    "RemoteProtocolError",
    "ShortageError",
    "TunnelListener",
    "TunneldError",
    "UsageError",
    "VisitorStream",
    "__version__",
    "client_tls_context",
    "connect",
    "open_listener",
    "visit",
]

__version__ = "0.1.0"

# Imported on first use (PEP 562): the daemon and the commands import this package, too, and their `--help` must not
# wait for Trio.
_MODULES = {
    "Client": "client",
    "ConfigError": "errors",
    "LocalProtocolError": "errors",
    "NotAllowedError": "errors",
    "RefusedError": "errors",
    "RelayUnreachableError": "errors",
    "RemoteProtocolError": "errors",
    "ShortageError": "errors",
    "TunneldError": "errors",
    "TunnelListener": "agent.listener",
    "UsageError": "errors",
    "VisitorStream": "agent.listener",
    "client_tls_context": "tls.contexts",
    "connect": "client",
    "open_listener": "agent.listener",
    "visit": "agent.visit",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'tunneld' has no attribute {name!r}")
    value = getattr(import_module(f"tunneld.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
