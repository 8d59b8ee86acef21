"""HAProxy in TCP mode."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from tests.support.programs import free_port, listening


@asynccontextmanager
async def haproxy(folder: Path, find: Callable[[str], str], bind: str, server: str) -> AsyncIterator[int]:
    """Run HAProxy in TCP mode and yield its port. `bind` and `server` are options after the addresses."""
    path, port = find("haproxy"), await free_port()
    configuration = folder / f"haproxy-{port}.cfg"
    configuration.write_text(f"""
global
    maxconn 100
defaults
    mode tcp
    timeout connect 10s
    timeout client 20s
    timeout server 20s
listen here
    bind 127.0.0.1:{port} {bind}
    server there {server}
""")
    async with listening([path, "-db", "-f", str(configuration)], port):
        yield port
