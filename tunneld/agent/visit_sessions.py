"""The sessions of a visitor with one host: opened when they are needed, and again when they are lost.

    wanted ──► attempt ──► open ──► idle for `idle_timeout` ──► closed, until a stream is wanted
      ▲           │         │
      └─ back-off ┴◄─ lost ─┘

One session carries 126 streams; further ones are opened for more, up to `max_sessions`. A stream that is wanted while
there is none waits for `wait` seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import trio

from tunneld.agent.access import RelayAccess
from tunneld.agent.backoff import Backoff
from tunneld.agent.events import Reporter
from tunneld.agent.network import NetworkMonitor
from tunneld.agent.visit import VisitedTunnel, open_session
from tunneld.agent.visit_session import VisitSession
from tunneld.engine.engine import Engine
from tunneld.errors import (
    LimitReachedError,
    NoSuchTunnelError,
    NotAllowedError,
    RefusedError,
    RelayUnreachableError,
    TunneldError,
)
from tunneld.mux.channel import Channel

PASSING = frozenset({LimitReachedError.code, NoSuchTunnelError.code})
"""Codes of refusals that pass by themselves: the host's agent is away for a moment, or has too many visitors."""
RETRY_SPACING = 1.0
"""Seconds between two attempts while streams wait: no longer, and no shorter when further ones come."""


@dataclass(frozen=True, slots=True)
class VisitLimits:
    """Times in seconds, and a count."""

    idle_timeout: float = 600.0
    "A session without a stream is closed after this time: it counts as a visitor at the relay."

    wait: float = 10.0
    "How long a stream waits for a session: a relay that restarts is back by then."

    max_sessions: int = 8
    "Sessions of one port: a thousand streams."


class VisitSessions:
    """The sessions of one visitor."""

    def __init__(
        self,
        engine: Engine,
        relay: RelayAccess,
        tunnel: VisitedTunnel,
        reporter: Reporter,
        monitor: NetworkMonitor,
        limits: VisitLimits,
        *,
        on_over: Callable[[], None] | None = None,
    ) -> None:
        """With `on_over` there is one session, and never another one: that of a one-time code. It is called when that
        has ended.
        """
        self._engine = engine
        self._relay = relay
        self._tunnel = tunnel
        self._reporter = reporter
        self._monitor = monitor
        self._limits = limits
        self._on_over = on_over
        self._sessions: dict[VisitSession, None] = {}
        self._was_open = False
        self._waiting = 0  # streams
        self._lost: tuple[str, float] | None = None  # why a session was lost, and how long it had lasted
        self._reopen = False  # it was in use, so another one is opened before anything waits for it
        self._attempts = 0  # that failed
        self._failure: TunneldError | None = None  # of the last attempt
        self._attempted_at = -RETRY_SPACING
        self._wake = trio.Event()
        self._changed = trio.Event()
        self._pause = trio.CancelScope()

    async def run(self) -> None:
        """Keep sessions until cancelled; then close them."""
        backoff = Backoff()
        try:
            with self._monitor.calling(self._probe):
                while True:
                    if not self._wanted:
                        self._wake = trio.Event()
                        await self._wake.wait()
                        continue
                    if self._lost is not None:
                        reason, uptime = self._lost
                        self._lost, self._reopen = None, True
                        await self._back_off(backoff, reason, backoff.delay_after(uptime))
                    else:
                        await self._attempt(backoff)
        finally:
            for session in list(self._sessions):
                session.close("the visitor stopped")

    async def start(self) -> None:
        """Open the first session, or leave that to `run` where it may soon succeed. Raises `TunneldError`."""
        try:
            await self._connect()
        except TunneldError as error:
            if self._on_over is not None or not _passes(error):
                raise
            self._lost = str(error), 0.0

    def open_nowait(self) -> Channel | None:
        """A stream, if a session has room; the caller owns it."""
        for session in self._sessions:
            if session.usable:
                try:
                    return session.open()
                except LimitReachedError:
                    continue
        return None

    async def open(self) -> Channel:
        """A stream, which the caller owns. Waits for a session. Raises `TunneldError`."""
        attempts = self._attempts
        self._waiting += 1
        try:
            with trio.move_on_after(self._limits.wait):
                while (channel := self.open_nowait()) is None:
                    if self._over:
                        raise RefusedError(NotAllowedError.code, "the one-time code is used up")
                    if self._failure is not None and self._attempts > attempts and not _passes(self._failure):
                        raise self._failure
                    self._wake.set()
                    if trio.current_time() - self._attempted_at >= RETRY_SPACING:
                        self._pause.cancel()
                    await self._changed.wait()
                return channel
        finally:
            self._waiting -= 1
        if self._full:
            raise LimitReachedError(f"all {len(self._sessions)} sessions with {self._tunnel.title} are full")
        raise self._failure or RelayUnreachableError(f"no session with {self._tunnel.title} in {self._limits.wait:g} s")

    # Internal

    @property
    def _over(self) -> bool:
        return self._on_over is not None and self._was_open and not self._sessions

    @property
    def _full(self) -> bool:
        return len(self._sessions) >= (1 if self._on_over is not None else self._limits.max_sessions)

    @property
    def _wanted(self) -> bool:
        wanted = self._waiting > 0 or self._reopen or self._lost is not None
        return wanted and not (self._full or self._over or any(session.usable for session in self._sessions))

    async def _connect(self) -> None:
        self._attempted_at = trio.current_time()
        session = await open_session(self._engine, self._relay, self._tunnel)
        session.on_change = self._on_change
        self._sessions[session] = None
        self._was_open, self._reopen, self._failure = True, False, None
        session.close_when_idle(self._limits.idle_timeout)
        self._reporter.report("connected", peer=self._tunnel.title, id=str(self._tunnel.host))
        self._notify()

    async def _attempt(self, backoff: Backoff) -> None:
        try:
            await self._connect()
        except TunneldError as error:
            self._failure = error
            self._attempts += 1
            self._reopen = self._reopen and _passes(error)
            self._notify()
            if self._wanted:
                delay = backoff.next_delay()
                await self._back_off(backoff, str(error), min(delay, RETRY_SPACING) if self._waiting else delay)

    async def _back_off(self, backoff: Backoff, reason: str, delay: float) -> None:
        self._reporter.report("reconnecting", reason=reason, delay=round(delay, 1))
        with trio.CancelScope() as self._pause:
            if await self._monitor.sleep(delay):
                backoff.reset()

    def _probe(self) -> None:
        for session in list(self._sessions):
            session.probe()
        self._wake.set()

    def _on_change(self, session: VisitSession) -> None:
        """A session has room again, is idle, or is over."""
        if session.closed.is_set():
            self._on_closed(session)
        elif not session.carrier.channels:
            session.close_when_idle(self._limits.idle_timeout)
        self._wake.set()
        self._notify()

    def _on_closed(self, session: VisitSession) -> None:
        if self._sessions.pop(session, session) is session:
            return
        if session.is_broken:
            self._reporter.report("broken", peer=self._tunnel.title, reason=session.reason)
        if session.is_idle:
            self._reporter.report("idle", peer=self._tunnel.title, seconds=self._limits.idle_timeout)
        elif self._on_over is None:
            self._lost = (
                f"session with {self._tunnel.title} lost: {session.reason}",
                trio.current_time() - session.opened_at,
            )
        if self._over and self._on_over is not None:
            self._on_over()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()


def _passes(error: TunneldError) -> bool:
    """Whether another attempt may succeed without somebody doing something."""
    if isinstance(error, RefusedError):
        return error.reply_code in PASSING
    return isinstance(error, RelayUnreachableError)
