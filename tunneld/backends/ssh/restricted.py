"""Restrictions on asyncssh's connection: which requests are refused, limits, and what is the peer's fault.

Of all global requests and channels, only `-R`, its cancellation and sessions (see console.py) are accepted.
"""

from __future__ import annotations

import asyncio
import inspect
import sys
from collections.abc import Awaitable, Callable
from functools import partial

import asyncssh
import structlog
from asyncssh.constants import DISC_NO_MORE_AUTH_METHODS_AVAILABLE, DISC_TOO_MANY_CONNECTIONS
from asyncssh.misc import OptExcInfo
from asyncssh.packet import PacketDecodeError, SSHPacket

from tunneld.backends.ssh.negotiation import NegotiatingConnection

log = structlog.get_logger("ssh")

MAX_AUTH_TRIES = 6
"""Failed authentications per connection, as OpenSSH's MaxAuthTries: an ssh-agent may hold several keys."""
MAX_PENDING_REQUESTS = 64
"""Global requests per connection that wait for a reply: more `-R` than `max_forwards` allows by default."""
PEER_ERRORS = (PacketDecodeError, ValueError, asyncssh.Error)
"""What asyncssh raises for bytes that it cannot parse."""


class RestrictedConnection(NegotiatingConnection):
    """A connection that accepts what a tunnel needs, and nothing else."""

    def __init__(self, loop: asyncio.AbstractEventLoop, options: asyncssh.SSHServerConnectionOptions) -> None:
        super().__init__(loop, options)
        self.failures = 0  # failed authentications
        self.key_fingerprint = ""  # of the last key that an authorized_keys line admits
        self.after_response: Callable[[], None] | None = None  # called once, after the next reply to a global request
        self.is_ending = False
        self.close_error: Exception | None = None  # why it is ending; None: the client disconnected

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
        if self._transport is not None:
            self.is_ending, self.close_error = True, exc
        super()._force_close(exc)

    def internal_error(self, exc_info: OptExcInfo | None = None, error_logger: object = None) -> None:
        """An unexpected exception was caught, which costs the connection. Malformed input is the peer's fault;
        everything else is a bug, ours or asyncssh's, and is logged.
        """
        error = sys.exc_info()[1] if exc_info is None else exc_info[1]
        if isinstance(error, PEER_ERRORS):
            error = asyncssh.ProtocolError(f"malformed packet: {error}")
            self._send_disconnect(error.code, error.reason, error.lang)
        else:
            log.error("internal error: ssh connection closed", exc_info=error)
        self._force_close(error if isinstance(error, Exception) else None)

    async def _finish_port_forward(self, listen_host: str, listen_port: int) -> None:
        if self._owner is not None:  # the connection is still open
            await super()._finish_port_forward(listen_host, listen_port)

    # Refused requests, and limits

    async def reload_config(self) -> None:
        """Nothing: there is no asyncssh configuration file."""

    def send_userauth_failure(self, partial_success: bool) -> None:
        """Refuse one authentication, or disconnect after too many."""
        self.failures += 1
        if self.failures > MAX_AUTH_TRIES + 1:  # the first is mostly `none`, by which clients ask for the methods
            raise asyncssh.DisconnectError(DISC_NO_MORE_AUTH_METHODS_AVAILABLE, "too many authentication failures")
        super().send_userauth_failure(partial_success)

    def _process_global_request(self, pkttype: int, pktid: int, packet: SSHPacket) -> None:
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
