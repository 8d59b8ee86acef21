"""What `systemctl status` shows of a running daemon: one line of how it is, and beside it the watchdog is fed.

    Status: "2 tunnels, 14 visitors"
    Status: "2 tunnels, 14 visitors; reload failed, nothing changed: /etc/tunneld/tunnel.toml: control.port: ..."

What is the matter stays there until it is over: somebody who comes at night reads that first, and the journal second.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import trio

from tunneld.control.verbs import count
from tunneld.daemon import systemd
from tunneld.directory.service import TunnelService
from tunneld.errors import ConfigError, TunneldError
from tunneld.tls import expiry

PULSE = 15.0
"""Seconds between two words to systemd, where no watchdog wants them more often: a person looks again after as many."""
CERTIFICATES = 12 * 3600.0
"""Seconds between two looks at the dates of certificates: twice in the smallest unit in which they are told."""


class SystemdStatus:
    """How the daemon is."""

    def __init__(self, service: TunnelService, shown: Callable[[], Sequence[expiry.Shown]]) -> None:
        """`shown` are the certificates that it shows now."""
        self._service = service
        self._shown = shown
        self._failed = ""
        self._certificates: Sequence[str] = ()

    def __str__(self) -> str:
        tunnels = self._service.tunnels()
        counts = count(len(tunnels), "tunnel"), count(sum(len(tunnel.visitors) for tunnel in tunnels), "visitor")
        kept = ["reservations are not stored"] if self._service.reservations.place == "memory" else []
        return "; ".join([", ".join(counts), *([self._failed] if self._failed else []), *kept, *self._certificates])

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """A reload or a restart, in this block. That it failed is shown until another one works."""
        try:
            yield
        except TunneldError as error:
            self._failed = f"{what} failed, nothing changed: {_first_of(error)}"
            raise
        else:
            self._failed = ""
            self.look()
        finally:
            self._tell_now()

    def look(self) -> None:
        """At the certificates."""
        self._certificates = expiry.look(self._shown())

    async def tell(self) -> None:
        """Tell systemd until cancelled; and twice in what it set as the watchdog's interval that the scheduler, which
        runs everything here, has come round.
        """
        interval, looked = systemd.watchdog_interval(), -math.inf
        while True:
            if trio.current_time() - looked >= CERTIFICATES:
                self.look()
                looked = trio.current_time()
            self._tell_now(alive=interval is not None)
            await trio.sleep(min(PULSE if systemd.is_heard() else CERTIFICATES, (interval or math.inf) / 2))

    def _tell_now(self, *, alive: bool = False) -> None:
        """In one message: a manager that hangs costs a second, and not two. A drain has words of its own."""
        status = "" if self._service.draining else str(self)
        if alive:
            systemd.alive(status)
        elif status:
            systemd.status(status)


def _first_of(error: TunneldError) -> str:
    """A file may have many mistakes, and the line is one; the journal has them all."""
    if isinstance(error, ConfigError) and len(error.problems) > 1:
        return f"{error.problems[0]} (and {len(error.problems) - 1} more)"
    return str(error)
