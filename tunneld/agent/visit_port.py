"""A port on this machine whose clients reach a private tunnel: each is a stream in a session.

client ──► a stream, at once or when there is a session ──► joined ──► left
"""

from __future__ import annotations

import socket

import trio

from tunneld.agent.events import FAILURE_REPORTS, MAX_MESSAGES, Reporter
from tunneld.agent.visit import VisitedTunnel
from tunneld.agent.visit_sessions import VisitSessions
from tunneld.engine.engine import Engine, Relay, RelayEnd
from tunneld.engine.failures import reset_on_close
from tunneld.errors import TunneldError
from tunneld.mux.channel import Channel
from tunneld.net.endpoint import format_peer
from tunneld.policy.rates import LogLimiter


class VisitPort:
    """Serves the clients of one listener, which the caller owns."""

    def __init__(
        self, engine: Engine, sessions: VisitSessions, tunnel: VisitedTunnel, reporter: Reporter, *, linger: float
    ) -> None:
        """`linger` in seconds, see `Engine.join`."""
        self._engine = engine
        self._sessions = sessions
        self._tunnel = tunnel
        self._reporter = reporter
        self._linger = linger
        self._relays: dict[Relay, str] = {}  # with the address of the client
        self._repeats = LogLimiter(FAILURE_REPORTS, MAX_MESSAGES)
        self._nursery: trio.Nursery

    async def run(self, listener: socket.socket) -> None:
        """Serve until cancelled; then drop all clients."""
        async with trio.open_nursery() as self._nursery:
            registration = self._engine.listen(listener, self._on_client, self._on_failure)
            self._nursery.start_soon(self._sessions.run)
            try:
                await trio.sleep_forever()
            finally:
                registration.release()
                for relay in list(self._relays):
                    relay.drop()

    def _on_client(self, connection: socket.socket, peer: object) -> None:
        channel = self._sessions.open_nowait()
        if channel is not None:
            self._join(connection, format_peer(peer), channel)
        else:
            self._nursery.start_soon(self._serve, connection, format_peer(peer))

    def _on_failure(self, error: Exception) -> None:
        raise error

    async def _serve(self, connection: socket.socket, client: str) -> None:
        """Wait for a session."""
        try:
            channel = await self._sessions.open()
        except TunneldError as error:
            reset_on_close(connection)
            connection.close()
            reason = str(error)
            if (repeated := self._repeats.passes(trio.current_time(), reason)) is not None:
                self._reporter.report("failed", visitor=client, reason=reason, repeated=repeated)
        except BaseException:
            connection.close()
            raise
        else:
            self._join(connection, client, channel)

    def _join(self, connection: socket.socket, client: str, channel: Channel) -> None:
        if self._reporter.wants_visitors:
            node = str(self._tunnel.host)
            self._reporter.report("visiting", visitor=client, peer=self._tunnel.title, id=node)
        relay = self._engine.join(connection, channel, linger=self._linger, on_end=self._on_relay_end)
        self._relays[relay] = client

    def _on_relay_end(self, relay: Relay, end: RelayEnd) -> None:
        client = self._relays.pop(relay, "")
        if self._reporter.wants_visitors:
            self._reporter.report("left", visitor=client, up=relay.up, down=relay.down, reason=str(end))
