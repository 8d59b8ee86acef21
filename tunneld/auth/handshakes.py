"""Where those wait who have connected to a port for hidden servers, until it is known whose they are.

    lobby
    └─ newcomer ×N             a task until it has shown its key: TLS, and what is said first, under one deadline

A newcomer is a stranger, counted and penalised with those of the control port: it has shown nothing yet.
"""

from __future__ import annotations

import random
import socket
import ssl
from collections.abc import Awaitable, Callable
from typing import Any

import structlog
import trio

from tunneld.auth.authenticator import Authenticator
from tunneld.auth.preauth import PreauthRefusal, PreauthSlot
from tunneld.errors import NotAllowedError, TunneldError, reason_of
from tunneld.net.endpoint import format_peer, unmap
from tunneld.tls.connection import PEER_CLOSED, is_truncation

log: structlog.stdlib.BoundLogger = structlog.get_logger("lobby")

Handshake = Callable[[], Awaitable[None]]
"""Hears a newcomer out, and takes it; raises OSError, or a `TunneldError` that says why not. Closes its connection
then, and where it is cancelled.
"""


class HandshakeSupervisor:
    """One for all ports of a relay. See `backends.Lobby`."""

    def __init__(
        self, gate: Authenticator, tls: Callable[[], ssl.SSLContext | None], timeout: Callable[[], float]
    ) -> None:
        """`tls` is asked at each handshake; `timeout` says how many seconds a newcomer has."""
        self._gate = gate
        self._tls = tls
        self._timeout = timeout
        self._nursery: trio.Nursery

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the newcomers until cancelled."""
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            await trio.sleep_forever()

    @property
    def tls(self) -> ssl.SSLContext | None:
        """For a handshake that begins now; None where this relay has no certificate."""
        return self._tls()

    def start(
        self, connection: socket.socket, peer: Any, face: str, hear: Handshake, timeout: float | None = None
    ) -> None:
        """Somebody connected to the port that `face` names in the log: is there a place for a stranger?"""
        host = unmap(peer[0])
        stranger = self._gate.preauth.acquire(host, trio.current_time(), random.random())
        if isinstance(stranger, PreauthRefusal):
            connection.close()
            self._gate.log_refusal(host, face, stranger)
        else:
            self._nursery.start_soon(self._hear_out, peer, face, hear, stranger, timeout or self._timeout())

    async def _hear_out(self, peer: Any, face: str, hear: Handshake, stranger: PreauthSlot, timeout: float) -> None:
        """One newcomer, until somebody has taken it or it is gone."""
        try:
            with trio.move_on_after(timeout) as scope:
                await hear()
            if scope.cancelled_caught:
                self._reject(peer, face, stranger, f"it has not shown its key in {timeout:g} s")
        except NotAllowedError as error:
            self._gate.log_failure(unmap(peer[0]), face, str(error))
        except TunneldError as error:
            self._tell(peer, face, error)
        except OSError as error:
            if isinstance(error, ssl.SSLError) and not is_truncation(error):
                self._reject(peer, face, stranger, reason_of(error))
            else:  # who leaves has not failed to prove anything: it may be an agent that we kept waiting
                self._tell(peer, face, error)
        except Exception:
            log.exception("could not hear a hidden server out: a bug", peer=format_peer(peer), face=face)
        finally:
            stranger.release()

    def _tell(self, peer: Any, face: str, error: Exception) -> None:
        reason = reason_of(error) if isinstance(error, OSError) else str(error)
        if is_truncation(error):
            reason = PEER_CLOSED
        log.info("hidden server refused", peer=format_peer(peer), face=face, reason=reason)

    def _reject(self, peer: Any, face: str, stranger: PreauthSlot, reason: str) -> None:
        stranger.fail(trio.current_time())
        log.info("hidden server refused", peer=format_peer(peer), face=face, reason=reason)
