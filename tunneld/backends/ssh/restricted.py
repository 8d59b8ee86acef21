"""Restrictions on asyncssh's connection: which requests are refused, limits, and what is the peer's fault.

Of all global requests and channels, only `-R`, its cancellation and sessions (see console.py) are accepted. The
requests of a session are in session_channel.py.

What is the peer's fault: packets that RFC 4253, section 6, does not allow, and everything that asyncssh raises for what
a peer sent, a KeyError or a failed assertion included. It costs the connection and one line in the log. Only an
exception from code of ours is a bug.
"""

from __future__ import annotations

import asyncio
import inspect
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from types import TracebackType

import asyncssh
import structlog
from asyncssh.constants import DISC_NO_MORE_AUTH_METHODS_AVAILABLE, DISC_TOO_MANY_CONNECTIONS
from asyncssh.misc import OptExcInfo
from asyncssh.packet import Boolean, PacketDecodeError, SSHPacket, String

from tunneld.backends.ssh.negotiation import NegotiatingConnection
from tunneld.backends.ssh.session_channel import SessionChannel

log = structlog.get_logger("ssh")

MAX_AUTH_TRIES = 6
"""Failed authentications per connection, as OpenSSH's MaxAuthTries: an ssh-agent may hold several keys."""
GLOBAL_REQUESTS = frozenset(
    {b"tcpip-forward", b"cancel-tcpip-forward", b"streamlocal-forward@openssh.com", b"keepalive@openssh.com"}
)
"""The global requests that are read, of which one is refused with an explanation. All others are refused unread."""
MAX_REQUEST_BYTES = 1024
"""Bytes of a global request. A host name has 255."""
MIN_PADDING = 4
"""Bytes of padding in a packet (RFC 4253, section 6)."""
MIN_PACKET = 1 + 1 + MIN_PADDING
"""The packet_length of a packet that has a type: the length of the padding, the type, the padding."""
MAX_PENDING_REQUESTS = 64
"""Global requests per connection that wait for a reply: more `-R` than `max_forwards` allows by default."""
PEER_ERRORS = (PacketDecodeError, ValueError, asyncssh.Error)
"""What is the peer's fault wherever it is raised: bytes that cannot be parsed."""
OUR_PACKAGE = "tunneld."


def is_fault_of_peer(error: BaseException) -> bool:
    """Whether malformed input raised an exception, and not a bug in a module of ours."""
    return isinstance(error, PEER_ERRORS) or not _innermost_module(error.__traceback__).startswith(OUR_PACKAGE)


def _innermost_module(traceback: TracebackType | None) -> str:
    """The module that raised; empty if that is not known."""
    name = ""
    while traceback is not None:
        name, traceback = str(traceback.tb_frame.f_globals.get("__name__", "")), traceback.tb_next
    return name


class RestrictedConnection(NegotiatingConnection):
    """A connection that accepts what a tunnel needs, and nothing else."""

    def __init__(self, loop: asyncio.AbstractEventLoop, options: asyncssh.SSHServerConnectionOptions) -> None:
        super().__init__(loop, options)
        self.failures = 0  # failed authentications
        self.key_fingerprint = ""  # of the last key that an authorized_keys line admits
        self.after_response: Callable[[], None] | None = None  # called once, after the next reply to a global request
        self.is_ending = False
        self.close_error: Exception | None = None  # why it is ending; None: the client disconnected

    def bind(self, new_server: Callable[[], asyncssh.SSHServer], on_end: Callable[[str], None]) -> None:
        """`new_server` creates the object with our callbacks; `on_end` is called once, when the socket is closed."""
        self._protocol_factory = new_server
        self._on_end = on_end

    def on_transport_lost(self, reason: str) -> None:
        """The socket is closed."""
        if not self.is_ending:
            self.connection_lost(asyncssh.ConnectionLost(reason))
        self._on_end(reason)

    def on_ssh_lost(self, error: Exception | None) -> None:
        """Asyncssh reports the end, of which `on_transport_lost` has told already."""

    def begin_when_answered(self, callback: Callable[[], None]) -> None:
        """Call `callback` once the reply to the present global request has been sent."""
        self.after_response = callback

    # Authentication

    async def _validate_client_certificate(self, username: str, key_data: bytes) -> asyncssh.SSHKey | None:
        return self._record_key(await super()._validate_client_certificate(username, key_data))

    async def _validate_client_public_key(self, username: str, key_data: bytes) -> asyncssh.SSHKey | None:
        return self._record_key(await super()._validate_client_public_key(username, key_data))

    def _record_key(self, key: asyncssh.SSHKey | None) -> asyncssh.SSHKey | None:
        """Remember the key's fingerprint. The last one before a login had its signature verified."""
        if key is not None:
            self.key_fingerprint = key.get_fingerprint()
        return key

    # Tasks and closing

    def create_task(
        self, coro: Awaitable[None], task_logger: asyncssh.logging.SSHLogger | None = None
    ) -> asyncio.Task[None]:
        """Start a task in the connection's loop. asyncssh would use the running loop, and the pump's task has none."""
        assert inspect.iscoroutine(coro)
        task: asyncio.Task[None] = self._loop.create_task(coro)
        task.add_done_callback(partial(self._reap_task, task_logger))
        self._tasks.add(task)
        return task

    def _force_close(self, exc: Exception | None) -> None:
        """Record why the connection ends before the socket is closed; None: the client disconnected."""
        if self._transport is not None and not isinstance(exc, asyncssh.ConnectionLost):
            self.is_ending, self.close_error = True, exc
        super()._force_close(exc)

    def internal_error(self, exc_info: OptExcInfo | None = None, error_logger: object = None) -> None:
        """An unexpected exception was caught, which costs the connection. What asyncssh raises for a packet is
        the peer's fault; an exception from code of ours is a bug, and is logged.
        """
        error = sys.exc_info()[1] if exc_info is None else exc_info[1]
        if error is not None and is_fault_of_peer(error):
            error = asyncssh.ProtocolError(f"malformed packet: {type(error).__name__}: {error}")
            self._send_disconnect(error.code, error.reason, error.lang)
        else:
            log.error("internal error: ssh connection closed", exc_info=error)
        self._force_close(error if isinstance(error, Exception) else None)

    async def _finish_port_forward(self, listen_host: str, listen_port: int) -> None:
        if self._owner is not None:  # the connection is still open
            await super()._finish_port_forward(listen_host, listen_port)

    # Malformed packets

    def _recv_pkthdr(self) -> bool:
        """Check the lengths of a packet, with which asyncssh computes before it checks anything."""
        if not super()._recv_pkthdr():
            return False
        size, block = self._pktlen, self._recv_blocksize
        if size < MIN_PACKET or size + 4 < block:
            raise asyncssh.ProtocolError(f"a packet of {size} bytes is too small")
        if self._recv_encryption is None:
            if (size + 4) % block:
                raise asyncssh.ProtocolError(f"a packet of {size} bytes does not fill blocks")
            if not MIN_PADDING <= self._packet[4] <= size - 2:
                raise asyncssh.ProtocolError(f"{self._packet[4]} bytes of padding in a packet of {size}")
        elif size % block and (size + 4) % block:  # some ciphers leave the length out of the blocks
            raise asyncssh.ProtocolError(f"a packet of {size} bytes does not fill blocks")
        return True

    # Refused requests, and limits

    async def reload_config(self) -> None:
        """Nothing: there is no asyncssh configuration file."""

    def send_userauth_failure(self, partial_success: bool) -> None:
        """Refuse one authentication, or disconnect after too many."""
        self.failures += 1
        if self.failures > MAX_AUTH_TRIES + 1:  # the first is mostly `none`, by which clients ask for the methods
            raise asyncssh.DisconnectError(DISC_NO_MORE_AUTH_METHODS_AVAILABLE, "too many authentication failures")
        super().send_userauth_failure(partial_success)

    def create_server_channel(
        self, encoding: str | None = "", errors: str = "", window: int = 0, max_pktsize: int = 0
    ) -> SessionChannel:
        """A channel that refuses requests which no session needs."""
        return SessionChannel.like(super().create_server_channel(encoding, errors, window, max_pktsize))

    def _process_global_request(self, pkttype: int, pktid: int, packet: SSHPacket) -> None:
        size, request = len(packet.get_full_payload()), SSHPacket(packet.get_full_payload())
        request.get_byte()
        name, wants_reply = request.get_string(), request.get_boolean()
        if name not in GLOBAL_REQUESTS or size > MAX_REQUEST_BYTES:
            if not wants_reply:
                return
            packet = SSHPacket(bytes((pkttype,)) + String(b"") + Boolean(True))  # asyncssh answers it in its turn
            packet.get_byte()
        if len(self._global_request_queue) >= MAX_PENDING_REQUESTS:
            raise asyncssh.DisconnectError(
                DISC_TOO_MANY_CONNECTIONS, f"too many requests: {MAX_PENDING_REQUESTS} wait for a reply"
            )
        super()._process_global_request(pkttype, pktid, packet)

    def _report_global_response(self, result: bool | bytes) -> None:
        """Send the reply, then call `after_response`. A client that requested port 0 learns its port from the reply,
        and refuses channels before that.
        """
        callback, self.after_response = self.after_response, None
        super()._report_global_response(result)
        if callback is not None:
            callback()

    def _process_cancel_tcpip_forward_global_request(self, packet: SSHPacket) -> None:
        request = SSHPacket(packet.get_remaining_payload())
        host, port = request.get_string().decode(errors="replace").lower(), request.get_uint32()
        if (host, port) in self._local_listeners:
            super()._process_cancel_tcpip_forward_global_request(packet)
        else:
            self._report_global_response(False)

    def _refuse_global_request(self, packet: SSHPacket) -> None:
        self._report_global_response(False)

    _process_hostkeys_prove_00_at_openssh_dot_com_global_request = _refuse_global_request
    _process_cancel_streamlocal_forward_at_openssh_dot_com_global_request = _refuse_global_request
