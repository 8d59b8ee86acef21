"""Less than asyncssh does: what is not answered, how often one may try, and whose fault it is when something breaks.

**Not answered** are all requests and channels but `-R`, its end, and sessions (see `words`).
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
"""Failed proofs on one connection; OpenSSH's MaxAuthTries: an agent may have several keys."""
MAX_PENDING_REQUESTS = 64
"""Requests that wait for an answer on one connection: more -R than `max_forwards` takes, by default."""
MEANINGLESS = (PacketDecodeError, ValueError, asyncssh.Error)
"""What asyncssh raises of octets that it cannot read."""


class RestrictedConnection(NegotiatingConnection):
    """A connection that can do what a tunnel needs."""

    def __init__(self, loop: asyncio.AbstractEventLoop, options: asyncssh.SSHServerConnectionOptions) -> None:
        super().__init__(loop, options)
        self.failures = 0  # proofs that were wrong
        self.proof = ""  # the fingerprint of the last key that was known
        self.follow: Callable[[], None] | None = None  # what is to come right after the next answer
        self.is_ending = False
        self.farewell: Exception | None = None

    # Proofs

    async def _validate_client_certificate(self, username: str, key_data: bytes) -> asyncssh.SSHKey | None:
        return self._note(await super()._validate_client_certificate(username, key_data))

    async def _validate_client_public_key(self, username: str, key_data: bytes) -> asyncssh.SSHKey | None:
        return self._note(await super()._validate_client_public_key(username, key_data))

    def _note(self, key: asyncssh.SSHKey | None) -> asyncssh.SSHKey | None:
        """The last one before a login is the one that was proved: nothing comes between."""
        if key is not None:
            self.proof = key.get_fingerprint()
        return key

    # Tasks and ends

    def create_task(
        self, coro: Awaitable[None], task_logger: asyncssh.logging.SSHLogger | None = None
    ) -> asyncio.Task[None]:
        """The loop is the connection's, also where the pump's task is the one that runs, which has none."""
        assert inspect.iscoroutine(coro)
        task: asyncio.Task[None] = self._loop.create_task(coro)
        task.add_done_callback(partial(self._reap_task, task_logger))
        self._tasks.add(task)
        return task

    def _force_close(self, exc: Exception | None) -> None:
        """Why it ends is known before the socket is closed; None: the client said good-bye."""
        if self._transport is not None:
            self.is_ending, self.farewell = True, exc
        super()._force_close(exc)

    def internal_error(self, exc_info: OptExcInfo | None = None, error_logger: object = None) -> None:
        """What nobody expected. Octets that mean nothing are the peer's fault; all else is a bug, ours or asyncssh's:
        it costs the connection, and is not kept from anybody.
        """
        error = sys.exc_info()[1] if exc_info is None else exc_info[1]
        if isinstance(error, MEANINGLESS):
            error = asyncssh.ProtocolError(f"what it said means nothing: {error}")
            self._send_disconnect(error.code, error.reason, error.lang)
        else:
            log.error("ssh connection failed: a bug", exc_info=error)
        self._force_close(error if isinstance(error, Exception) else None)

    async def _finish_port_forward(self, listen_host: str, listen_port: int) -> None:
        if self._owner is not None:  # it may have gone since
            await super()._finish_port_forward(listen_host, listen_port)

    # What is not answered, and how often one may try

    async def reload_config(self) -> None:
        """There is no file of asyncssh's to read for this user."""

    def send_userauth_failure(self, partial_success: bool) -> None:
        """Once more, or good-bye."""
        self.failures += 1
        if self.failures > MAX_AUTH_TRIES + 1:  # the first is mostly `none`, by which clients ask what there is
            raise asyncssh.DisconnectError(DISC_NO_MORE_AUTH_METHODS_AVAILABLE, f"{MAX_AUTH_TRIES} proofs failed")
        super().send_userauth_failure(partial_success)

    def _process_global_request(self, pkttype: int, pktid: int, packet: SSHPacket) -> None:
        if len(self._global_request_queue) >= MAX_PENDING_REQUESTS:
            raise asyncssh.DisconnectError(
                DISC_TOO_MANY_CONNECTIONS, f"{MAX_PENDING_REQUESTS} requests wait for an answer"
            )
        super()._process_global_request(pkttype, pktid, packet)

    def _report_global_response(self, result: bool | bytes) -> None:
        """A client that asked for any port knows from the answer which it is, and refuses visitors before that."""
        follow, self.follow = self.follow, None
        super()._report_global_response(result)
        if follow is not None:
            follow()

    def _process_cancel_tcpip_forward_global_request(self, packet: SSHPacket) -> None:
        look = SSHPacket(packet.get_remaining_payload())
        host, port = look.get_string().decode(errors="replace").lower(), look.get_uint32()
        if (host, port) in self._local_listeners:
            super()._process_cancel_tcpip_forward_global_request(packet)
        else:
            self._report_global_response(False)

    def _process_answerless(self, packet: SSHPacket) -> None:
        self._report_global_response(False)

    _process_hostkeys_prove_00_at_openssh_dot_com_global_request = _process_answerless
    _process_cancel_streamlocal_forward_at_openssh_dot_com_global_request = _process_answerless
