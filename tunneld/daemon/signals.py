"""What signals mean to the daemon: TERM and INT drain it, and stop it when they come again; HUP is a reload, USR2 a
restart into the program as it is now, USR1 the same by way of systemd.

Nobody waits for an answer to a signal: what fails changes nothing, and the log says why.
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


class Obedient(Protocol):
    """What a daemon can be told by signals."""

    def reload(self) -> object:
        """Read the configuration again. Raises `TunneldError`."""

    async def restart(self) -> None:
        """Begin to turn into the program as it is now. Raises `TunneldError`."""

    def store(self) -> None:
        """End, and let systemd keep what goes along for the next process."""

    def shutdown(self, *, drain: bool) -> None:
        """End: the first time with `drain` lets relays finish."""


async def obey(signals: AsyncIterator[int], daemon: Obedient, nursery: trio.Nursery) -> None:
    """Do what comes, until cancelled; `nursery` owns what takes longer."""
    async for number in signals:
        log.info("signal", name=signal.Signals(number).name)
        match number:
            case signal.SIGHUP:
                _reload(daemon)
            case signal.SIGUSR1:
                _store(daemon)
            case signal.SIGUSR2:
                nursery.start_soon(_restart, daemon)
            case _:
                daemon.shutdown(drain=True)


def _reload(daemon: Obedient) -> None:
    try:
        daemon.reload()
    except TunneldError as error:
        log.warning("reload failed, nothing changed", reason=str(error))


def _store(daemon: Obedient) -> None:
    if ending.is_kept():
        daemon.store()
    else:
        log.warning("nobody keeps connections for the next process (FDSTORE), so they are drained")
        daemon.shutdown(drain=True)


async def _restart(daemon: Obedient) -> None:
    try:
        await daemon.restart()
    except TunneldError as error:
        log.warning("restart failed, nothing changed", reason=str(error))
