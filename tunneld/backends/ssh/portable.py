"""SSH with asyncssh's public interface alone: for versions of asyncssh whose internals we do not know.

It takes the place of fast.py, restricted.py, negotiation.py, gcm.py, session_channel.py, carrier.py and channel.py, and
overrides nothing of asyncssh. What it lacks: speed (a task and a queue for each packet), the relay's choice of ciphers,
the refusal of environment variables, a keepalive on demand, and counting failed keys one by one.

    PortableConnection    the protocol of one connection, around an `asyncssh.SSHServerConnection`
    PortableCarrier       its forwarded channels: a `ChannelTransport`
    └─ ForwardSession ×N  one of them, as asyncssh's session
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import asyncssh
import structlog
import trio

from tunneld.backends.ssh.forwarded import ForwardedChannel
from tunneld.mux.channel import Channel
from tunneld.mux.heartbeat import Heartbeat
from tunneld.mux.limits import CarrierLimits
from tunneld.mux.window import ReceiveWindow, WindowBudget

if TYPE_CHECKING:
    from tunneld.backends.ssh.channel import ForwardEvents
    from tunneld.backends.ssh.transport import SshTransport

log = structlog.get_logger("ssh")

READ_BYTES = 8 * 1024
"""Read per turn of the pump, if the owner's share of the turn allows it."""
BYTES_PER_COST = 64
"""Received bytes per unit of cost (engine/budget.py): asyncssh handles a packet of this size in some microseconds."""
MAX_PENDING_INPUT = 64 * 1024
"""Bytes that were read and wait for asyncssh; then reading stops."""
MAX_UNSENT = 64 * 1024
"""Bytes of one channel that wait in asyncssh for the client's window."""
CHANNEL_WINDOW = 256 * 1024
"""Bytes that a client may send on a channel whose visitor does not read."""
CLOSE_TIMEOUT = 2.0
"""Seconds until a closed socket is reported even if asyncssh does not report the end of the connection."""
HIDDEN_ORIGINATOR = ("0.0.0.0", 0)


class PortableConnection:
    """One client's connection: a `PacketReceiver`, and what `SshConnection` needs."""

    has_unparsed = False
    read_limit = READ_BYTES

    def __init__(self, loop: asyncio.AbstractEventLoop, options: asyncssh.SSHServerConnectionOptions) -> None:
        self.transport: SshTransport
        self._new_server: Callable[[], asyncssh.SSHServer]
        self._on_end: Callable[[str], None]
        self.is_ending = False
        self.close_error: Exception | None = None
        self.channels = 0
        self._reason = "closed"
        self._tasks: set[asyncio.Task[None]] = set()
        self._asked_for_key = self._is_reported = False
        self._pending = 0  # bytes
        self._loop = loop
        self._options = options
        self._ssh: asyncssh.SSHServerConnection

    def connection_made(self, transport: SshTransport) -> None:
        """Begin the protocol."""
        options = asyncssh.SSHServerConnectionOptions(options=self._options, server_factory=self._new_server)
        self._ssh = asyncssh.SSHServerConnection(self._loop, options)
        self._loop.call_soon(self._ssh.connection_made, transport)

    def bind(self, new_server: Callable[[], asyncssh.SSHServer], on_end: Callable[[str], None]) -> None:
        """See `RestrictedConnection.bind`."""
        self._new_server, self._on_end = new_server, on_end

    # What the transport calls

    @property
    def is_busy(self) -> bool:
        """See `PacketReceiver.is_busy`."""
        return self._pending > MAX_PENDING_INPUT

    def take_partial_packet(self) -> bytes:
        """See `PacketReceiver.take_partial_packet`."""
        return b""

    def feed(self, data: memoryview) -> None:
        """See `PacketReceiver.feed`."""
        if data:
            self.transport.turns.share.use(1 + len(data) // BYTES_PER_COST)
            self._pending += len(data)
            self._loop.call_soon(self._receive, bytes(data))

    def _receive(self, data: bytes) -> None:
        was_busy = self.is_busy
        self._pending -= len(data)
        self._ssh.data_received(data)  # also when the socket is closed: a DISCONNECT may be the last that came
        if was_busy and not self.is_busy:
            self.transport.resume_reading()

    def on_transport_lost(self, reason: str) -> None:
        """The socket is closed: wait until asyncssh says why."""
        self._reason = reason
        self._loop.call_soon(self._ssh.connection_lost, asyncssh.ConnectionLost(reason))
        self._loop.call_later(CLOSE_TIMEOUT, self._report)

    def on_ssh_lost(self, error: Exception | None) -> None:
        """Asyncssh reports the end of the connection; None: the client disconnected."""
        if not isinstance(error, asyncssh.ConnectionLost):
            self.is_ending, self.close_error = True, error
        if not self.transport.is_closing():
            self.transport.end("closed")
        self._report()

    def _report(self) -> None:
        if not self._is_reported:
            self._is_reported = True
            self._on_end(self._reason)

    # What `SshServer` and `SshConnection` call

    @property
    def failures(self) -> int:
        """1 if the client was asked for a key. asyncssh does not tell how many it has refused."""
        return int(self._asked_for_key)

    @property
    def key_fingerprint(self) -> str:
        """Empty: asyncssh does not tell which key was accepted, so all keys of a credential are one client."""
        return ""

    @property
    def channel_count(self) -> int:
        """Forwarded channels."""
        return self.channels

    def set_authorized_keys(self, keys: asyncssh.SSHAuthorizedKeys | None) -> None:
        """The client must authenticate with one of these keys."""
        self._asked_for_key = True
        self._ssh.set_authorized_keys(keys)

    def get_key_option(self, name: str) -> Any:
        """An option of the key that the client has proved."""
        return self._ssh.get_key_option(name)

    def send_debug(self, text: str, *, always_display: bool) -> None:
        """Send a debug message."""
        self._ssh.send_debug(text, always_display=always_display)

    def disconnect(self, code: int, reason: str) -> None:
        """Send SSH_MSG_DISCONNECT."""
        self._ssh.disconnect(code, reason)

    def begin_when_answered(self, callback: Callable[[], None]) -> None:
        """Call `callback` once the reply to the present global request has been sent."""
        self._loop.call_soon(callback)

    async def create_forward(self, session: ForwardSession, place: tuple[str, int], visitor: tuple[str, int]) -> None:
        """Open a channel for a visitor. Raises `asyncssh.ChannelOpenError`."""
        await self._ssh.create_connection(lambda: session, *place, *visitor, window=CHANNEL_WINDOW)

    def create_task(self, coroutine: Any) -> None:
        """Run a coroutine in the loop."""
        task: asyncio.Task[None] = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class ForwardSession(asyncssh.SSHTCPSession[bytes]):
    """One forwarded channel."""

    def __init__(self, carrier: PortableCarrier, events: ForwardEvents, number: int) -> None:
        self.carrier = carrier
        self.events = events
        self.number = number
        self.channel: Channel
        self.ssh: asyncssh.SSHTCPChannel[bytes] | None = None  # None: not confirmed
        self.is_blocked = self.eof_seen = self.finishing = self.released = self.closed_by_peer = False
        self.unread = 0  # bytes that the visitor has not taken

    # Called by asyncssh

    def connection_made(self, chan: asyncssh.SSHTCPChannel[bytes]) -> None:
        """The client has connected to the local server."""
        self.ssh = chan
        chan.set_write_buffer_limits(MAX_UNSENT)
        if self.released:
            chan.abort()
            return
        self.channel.notify_writable()
        if self.finishing and not self.released:
            self.carrier.finish(self.channel)

    def data_received(self, data: bytes, _datatype: object = None) -> None:
        """Bytes for the visitor."""
        if self.released:
            return
        self.unread += len(data)
        if self.unread > CHANNEL_WINDOW and self.ssh is not None:
            self.ssh.pause_reading()
        with memoryview(data) as view:
            self.channel.feed(view)

    def eof_received(self) -> bool:
        """The client sends no more. True: the other direction stays open."""
        if not self.eof_seen and not self.released:
            self.eof_seen = True
            self.channel.feed_eof()
            if self.finishing and not self.released:
                self.carrier.close(self)
        return True

    def connection_lost(self, error: Exception | None) -> None:
        """The channel is closed. A visitor that has its end of file may read on; if it writes, it is reset."""
        self.closed_by_peer, self.ssh = True, None
        self.carrier.connection.channels -= 1
        if self.released:
            self.events.on_capacity(self.channel)
        elif self.eof_seen and error is None:
            self.channel.notify_writable()
        else:
            self.carrier.release(self)
            self.channel.notify_reset("closed by the peer" if error is None else str(error))

    def pause_writing(self) -> None:
        """Asyncssh holds enough."""
        self.is_blocked = True

    def resume_writing(self) -> None:
        """Asyncssh takes more."""
        self.is_blocked = False
        if not self.released:
            self.channel.notify_writable()


class PortableCarrier:
    """The forwarded channels of one connection; see `SshCarrier`, whose interface it has."""

    def __init__(
        self,
        connection: PortableConnection,
        transport: SshTransport,
        limits: CarrierLimits,
        dial_timeout: float,
        _on_unresponsive: Callable[[], None],
    ) -> None:
        self.pump = transport.pump
        self.limits = limits
        self.dial_timeout = dial_timeout
        self.over = False
        self.connection = connection
        self.transport = transport
        self.heartbeat = Heartbeat(self, limits, transport.pump.timers, transport.link.idle_seconds)
        transport.heartbeat = self.heartbeat
        self._budget = WindowBudget(limits.window_budget, transport.pump.now, transport.link.round_trip)
        self._sessions: dict[int, ForwardSession] = {}
        self._next = 0

    def open(self, events: ForwardEvents) -> Channel:
        """See `SshCarrier.open`."""
        self._next += 1
        session = ForwardSession(self, events, self._next)
        window = ReceiveWindow(self.limits.initial_window, self.limits.max_window, self._budget)
        session.channel = ForwardedChannel(self, session.number, window)
        self._sessions[session.number] = session
        self.connection.channels += 1
        return session.channel

    def on_lost(self, reason: str) -> None:
        """See `SshCarrier.on_lost`."""
        self.over = True
        self.heartbeat.stop()
        for each in list(self._sessions.values()):
            self.release(each)
            each.channel.notify_reset(f"the ssh connection was lost: {reason}")

    async def is_alive(self) -> bool:
        """Whether the connection is open: asyncssh closes it when its keepalives are not answered."""
        await trio.lowlevel.checkpoint()
        return not self.over

    def release(self, session: ForwardSession) -> None:
        """The visitor's side has ended. Idempotent."""
        if self._sessions.pop(session.number, None) is not None:
            session.released = True
            session.channel.release_window()
            session.events.on_capacity(session.channel)

    # `ChannelTransport`

    def accept(self, channel: Channel) -> None:
        """Nothing: the peer cannot open a forwarded channel."""

    def set_originator(self, channel: Channel, visitor: Any | None) -> None:
        """Open the channel with the visitor as its originator."""
        if session := self._sessions.get(channel.sid):
            source = HIDDEN_ORIGINATOR if visitor is None else (str(visitor[0]), int(visitor[1]))
            self.connection.create_task(self._open(session, source))

    async def _open(self, session: ForwardSession, source: tuple[str, int]) -> None:
        """Open a channel. A confirmation that comes too late is awaited nevertheless, and the channel closed then."""
        opening = asyncio.ensure_future(self.connection.create_forward(session, session.events.place, source))
        if not (await asyncio.wait({opening}, timeout=self.dial_timeout))[0]:
            seconds = f"{self.dial_timeout:g} s"
            self._fail(session, f"the ssh client did not reach the local server in {seconds} (ssh.dial_timeout)")
        try:
            await opening
        except asyncssh.ChannelOpenError as error:
            reason = f"refused by the ssh client: {error.reason}"
        except (OSError, asyncssh.Error) as error:
            reason = str(error)
        else:
            return
        self.connection.channels -= 1
        session.events.on_capacity(session.channel)
        self._fail(session, reason)

    def _fail(self, session: ForwardSession, reason: str) -> None:
        if not session.released:
            self.release(session)
            session.channel.notify_reset(reason)

    def send_capacity(self, channel: Channel) -> int:
        """See `ForwardCarrier.send_capacity`: what asyncssh may still hold."""
        session = self._sessions.get(channel.sid)
        if session is None:
            return 0
        if session.closed_by_peer:
            return MAX_UNSENT  # so that the visitor's next write resets it
        return 0 if session.ssh is None or session.is_blocked else MAX_UNSENT

    def write(self, sid: int, data: memoryview) -> int:
        """See `ChannelTransport.write`."""
        session = self._sessions[sid]
        if session.closed_by_peer:
            self.release(session)
            session.channel.notify_reset("closed by the peer")
            return len(data)
        if session.ssh is None:
            return 0
        session.ssh.write(bytes(data))
        return len(data)

    def grant_credit(self, sid: int, credit: int) -> None:
        """See `ChannelTransport.grant_credit`."""
        if session := self._sessions.get(sid):
            session.unread = max(0, session.unread - credit)
            if session.ssh is not None and session.unread <= CHANNEL_WINDOW:
                session.ssh.resume_reading()

    def finish(self, channel: Channel) -> None:
        """See `ChannelTransport.finish`."""
        if session := self._sessions.get(channel.sid):
            session.finishing = True
            if session.ssh is not None:
                session.ssh.write_eof()
            if session.eof_seen:
                self.close(session)

    def reset(self, channel: Channel, reason: str) -> None:
        """See `ChannelTransport.reset`."""
        session = self._sessions.get(channel.sid)
        if session is not None and session.channel is channel:
            self.release(session)
            if session.ssh is not None:
                session.ssh.abort()

    def close(self, session: ForwardSession) -> None:
        """Both directions have ended."""
        self.release(session)
        if session.ssh is not None:
            session.ssh.close()

    # Heartbeat: asyncssh has its own keepalive

    def send_ping(self) -> bool:
        """See `HeartbeatTarget.send_ping`."""
        return False

    def on_unresponsive(self) -> None:
        """See `HeartbeatTarget.on_unresponsive`."""

    def on_dead(self, reason: str) -> None:
        """See `HeartbeatTarget.on_dead`."""
        self.transport.end(reason)
