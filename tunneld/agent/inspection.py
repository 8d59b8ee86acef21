"""The inspector of an exposure: its connections to the local server get a tap.

    visitor ──► relay ──► tapped end ──► local server
                              └──► a copy, for the page of the inspector

Several exposures of a process with the same settings share one inspector.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

import trio

from tunneld.agent.config import ExposureConfig
from tunneld.agent.events import Reporter
from tunneld.agent.local import LocalServer
from tunneld.engine.end import BufferedEnd
from tunneld.engine.engine import Engine
from tunneld.engine.scheduler import Scheduler
from tunneld.engine.stream_end import StreamEnd
from tunneld.engine.tapped import Tap, TappedTransport
from tunneld.inspector.inspector import Inspector
from tunneld.inspector.recorder import ConnectionTap
from tunneld.inspector.replay import ReplayTarget
from tunneld.inspector.settings import InspectSettings

PUBLIC = (
    "the inspector listens on {host}: other machines that reach it and have the link see every request, over plain "
    "HTTP; prefer loopback and `ssh -L`"
)


class Inspection:
    """Taps for the connections of one exposure."""

    def __init__(self, inspector: Inspector, exposure: str, *, has_proxy_header: bool) -> None:
        self._inspector = inspector
        self._exposure = exposure
        self._has_proxy_header = has_proxy_header

    def new_tap(self, visitor: str) -> InspectedVisitor | None:
        """A tap for the connection of this visitor; None if too many are being inspected."""
        tap = self._inspector.tap(self._exposure, visitor, has_proxy_header=self._has_proxy_header)
        return None if tap is None else InspectedVisitor(tap)


class InspectedVisitor:
    """The tap of one visitor. Implements `VisitorTap`."""

    def __init__(self, tap: ConnectionTap) -> None:
        self._tap = tap

    def server_end(self, engine: Engine, server: socket.socket) -> BufferedEnd:
        """See `VisitorTap`."""
        return tapped_end(engine, server, self._tap)

    def end(self) -> None:
        """See `VisitorTap`."""
        self._tap.end()


def tapped_end(engine: Engine, connection: socket.socket, tap: Tap) -> BufferedEnd:
    """A connected socket as an end with a tap; it owns the socket. Raises OSError if the connection is broken, and
    closes it.
    """
    if sys.platform == "linux":
        from tunneld.engine.pump import Pump  # noqa: PLC0415 - both only on systems with epoll
        from tunneld.engine.tls_end import TlsEnd  # noqa: PLC0415

        if isinstance(engine, Pump):
            end = TlsEnd(engine, TappedTransport(connection, tap))
            try:
                end.start()
            except OSError:
                end.reset("not served")
                raise
            return end
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(connection))
    return StreamEnd(cast(Scheduler, engine), TappedStream(stream, tap))


class TappedStream(trio.abc.HalfCloseableStream):
    """The same as a `TappedTransport`, for the engine of other systems."""

    def __init__(self, stream: trio.SocketStream, tap: Tap) -> None:
        self.transport_stream = stream
        self._tap = tap

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """See `trio.abc.SendStream`."""
        self._tap.on_written(data)
        await self.transport_stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        """See `trio.abc.SendStream`."""
        await self.transport_stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        """See `trio.abc.ReceiveStream`."""
        data = await self.transport_stream.receive_some(max_bytes)
        self._tap.on_read(data)
        return data

    async def send_eof(self) -> None:
        """See `trio.abc.HalfCloseableStream`."""
        await self.transport_stream.send_eof()

    async def aclose(self) -> None:
        """See `trio.abc.AsyncResource`."""
        await self.transport_stream.aclose()


@dataclass(slots=True)
class SharedInspector:
    """An inspector that exposures share, until the last one leaves."""

    inspector: Inspector
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    users: int = 0

    async def run(self) -> None:
        """Run it, until the scope is cancelled."""
        with self.scope:
            await self.inspector.run()


@dataclass(slots=True)
class Inspectors:
    """The inspectors of a process, by their settings. `nursery` runs them."""

    nursery: trio.Nursery
    _running: dict[InspectSettings, SharedInspector] = field(default_factory=dict)

    @contextmanager
    def shared(self, settings: InspectSettings) -> Iterator[tuple[Inspector, bool]]:
        """The inspector with these settings during the block, and whether it is new. Raises `ListenError`."""
        found = self._running.get(settings)
        is_new = found is None
        if found is None:
            found = self._running[settings] = SharedInspector(Inspector(settings))
            self.nursery.start_soon(found.run)
        found.users += 1
        try:
            yield found.inspector, is_new
        finally:
            found.users -= 1
            if not found.users:
                del self._running[settings]
                found.scope.cancel()


@contextmanager
def open_inspection(
    config: ExposureConfig, local: LocalServer, reporter: Reporter, inspectors: Inspectors
) -> Iterator[Inspection]:
    """Inspect an exposure for the length of the block. Raises `ListenError`."""
    assert config.inspect is not None
    target, options = config.target, config.request.options
    name = str(options.get("name") or target)
    has_proxy_header = config.proxy_header or config.request.keep_header
    url = "http://localhost" if target.path else f"http://{target}"
    server = ReplayTarget(local.dial, url, has_proxy_header)
    with inspectors.shared(config.inspect) as (inspector, is_new), inspector.attached(name, server):
        if is_new:
            reporter.report("inspecting", url=inspector.url)
        if is_new and config.inspect.is_public:
            reporter.report("trouble", reason=PUBLIC.format(host=config.inspect.host), repeated=0)
        yield Inspection(inspector, name, has_proxy_header=has_proxy_header)
