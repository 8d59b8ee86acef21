"""Runs the handshake of each connection to a port for hidden servers: TLS and the proof of a key, under one deadline.

    HandshakeSupervisor.run
    └─ handshake ×N            one task per connection, until it has proved its key or is closed

A connection in a handshake is unauthenticated: it is counted and penalised together with such connections to the
control port.
"""

from __future__ import annotations

import random
import socket
import ssl
from collections.abc import Awaitable, Callable

import structlog
import trio

from tunneld.auth.authenticator import Authenticator, claim_of
from tunneld.auth.preauth import PreauthRefusal, PreauthSlot
from tunneld.errors import LimitReachedError, NotAllowedError, RemoteProtocolError, TunneldError, reason_of
from tunneld.net.endpoint import Peer, format_peer
from tunneld.tls.connection import PEER_CLOSED
from tunneld.tls.session import is_truncation

log: structlog.stdlib.BoundLogger = structlog.get_logger("auth")

Handshake = Callable[[], Awaitable[None]]
"""Authenticates one connection and hands it to its tunnel. It owns the connection and closes it when it fails or is
cancelled. Raises `OSError` if the connection fails, or a `TunneldError` that says why it was refused.
"""


class FailedProofError(NotAllowedError):
    """The peer proved nothing with `proof`: a wrong key, or a user name without a right key."""

    def __init__(self, message: str, proof: str) -> None:
        super().__init__(message)
        self.proof = proof


class NothingReceivedError(RemoteProtocolError):
    """The peer closed the connection before it sent anything, as probes do. This costs nothing and is no failure."""


class HandshakeSupervisor:
    """Runs the handshakes of all ports of a relay. Implements `tunnel.server_side.Handshakes`."""

    def __init__(
        self, authenticator: Authenticator, tls: Callable[[], ssl.SSLContext | None], timeout: Callable[[], float]
    ) -> None:
        """`tls` is called for each handshake; `timeout` returns the default deadline of a handshake in seconds."""
        self._authenticator = authenticator
        self._tls = tls
        self._timeout = timeout
        self._nursery: trio.Nursery

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the tasks of all handshakes until cancelled."""
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            await trio.sleep_forever()

    @property
    def tls(self) -> ssl.SSLContext | None:
        """The TLS context for a handshake that begins now; None if this relay has no certificate."""
        return self._tls()

    def start(
        self, connection: socket.socket, peer: Peer, service: str, handshake: Handshake, timeout: float | None = None
    ) -> None:
        """Start `handshake` for an accepted connection, or close the connection if its source or the relay has too many
        unauthenticated connections. The accepting port calls this; it no longer owns the connection afterwards.

        `service` names the port in the log; `timeout` is in seconds and defaults to that of the supervisor.
        """
        host = peer[0]
        slot = self._authenticator.preauth.acquire(host, trio.current_time(), random.random())
        if isinstance(slot, PreauthRefusal):
            connection.close()
            self._authenticator.log_refusal(host, service, slot)
        else:
            self._nursery.start_soon(self._run_one, peer, service, handshake, slot, timeout or self._timeout())

    async def _run_one(self, peer: Peer, service: str, handshake: Handshake, slot: PreauthSlot, timeout: float) -> None:
        """Run one handshake until it has succeeded, failed or timed out; log why it failed."""
        try:
            with trio.move_on_after(timeout) as scope:
                await handshake()
            if scope.cancelled_caught:
                self._log_penalised(peer, service, slot, f"no key was received within {timeout:g} s")
            else:
                self._authenticator.remember_login(peer[0])
                slot.release()
        except NotAllowedError as error:
            claim = claim_of("key", error.proof) if isinstance(error, FailedProofError) else None
            self._authenticator.log_failure(peer[0], service, str(error), claim=claim)
        except TunneldError as error:
            slot.has_begun = not isinstance(error, NothingReceivedError | LimitReachedError)
            self._log(peer, service, str(error))
        except OSError as error:
            if isinstance(error, ssl.SSLError) and not is_truncation(error):
                self._log_penalised(peer, service, slot, reason_of(error))
            else:  # closing early is no failed proof: it may be an agent that gave up waiting for us
                slot.has_begun = True
                self._log(peer, service, PEER_CLOSED if is_truncation(error) else reason_of(error))
        except Exception:
            log.exception("handshake of a hidden server failed: a bug", peer=format_peer(peer), service=service)
        finally:
            slot.close(trio.current_time())

    def _log(self, peer: Peer, service: str, reason: str) -> None:
        self._authenticator.log_limited(
            log.info, "hidden server refused", service, peer=format_peer(peer), reason=reason
        )

    def _log_penalised(self, peer: Peer, service: str, slot: PreauthSlot, reason: str) -> None:
        slot.fail(trio.current_time())
        self._log(peer, service, reason)
