"""Signals: TERM and INT drain the daemon, and stop it if they are repeated; HUP reloads; USR2 restarts into the program
now on disk; USR1 hands connections to systemd, which restarts the daemon.

A signal has no answer. A reload or restart that fails changes nothing, and the reason is logged.
"""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator
from typing import Protocol

import structlog
import trio

from tunneld.daemon import ending
from tunneld.errors import TunneldError

log = structlog.get_logger("daemon")

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


VERBS = {signal.SIGHUP: "reload", signal.SIGUSR1: "restart", signal.SIGUSR2: "restart"}
"""What signals ask for; every other one asks for `shutdown`."""


class SignalTarget(Protocol):
    """The methods of the daemon that signals call."""

    def reload(self) -> object:
        """Read the configuration again. Raises `TunneldError`."""

    async def restart(self) -> None:
        """Begin to turn into the program now on disk. Raises `TunneldError`."""

    def store(self) -> None:
        """End, and let systemd keep the connections for the next process."""

    def shutdown(self, *, drain: bool) -> None:
        """Stop; the first call with `drain` lets connections finish."""

    def on_signal(self, name: str, verb: str) -> None:
        """A signal with this name has arrived, which asks for the same as a verb."""


async def handle_signals(signals: AsyncIterator[int], daemon: SignalTarget, nursery: trio.Nursery) -> None:
    """Handle signals until cancelled. A restart runs as a task of `nursery`."""
    async for number in signals:
        name = signal.Signals(number).name
        log.info("signal", name=name)
        daemon.on_signal(name, VERBS.get(signal.Signals(number), "shutdown"))
        match number:
            case signal.SIGHUP:
                _reload(daemon)
            case signal.SIGUSR1:
                _store(daemon)
            case signal.SIGUSR2:
                nursery.start_soon(_restart, daemon)
            case _:
                daemon.shutdown(drain=True)


def _reload(daemon: SignalTarget) -> None:
    try:
        daemon.reload()
    except TunneldError as error:
        log.warning("reload failed, nothing changed", reason=str(error))


def _store(daemon: SignalTarget) -> None:
    if ending.can_store():
        daemon.store()
    else:
        log.warning("systemd cannot keep connections for the next process (FDSTORE); draining them instead")
        daemon.shutdown(drain=True)


async def _restart(daemon: SignalTarget) -> None:
    try:
        await daemon.restart()
    except TunneldError as error:
        log.warning("restart failed, nothing changed", reason=str(error))
