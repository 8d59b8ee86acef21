"""The status line in `systemctl status`, and the messages for systemd's watchdog.

    Status: "2 tunnels, 14 visitors"
    Status: "2 tunnels, 14 visitors; reload failed, nothing changed: /etc/tunneld/tunnel.toml: control.port: ..."

A problem is shown for as long as it lasts, so that an operator sees it before searching the journal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import trio

from tunneld import systemd
from tunneld.directory.service import TunnelService
from tunneld.errors import ConfigError, TunneldError
from tunneld.policy.units import count
from tunneld.tls.store import CertificateStore

UPDATE_INTERVAL = 15.0
"""Seconds between two updates of the status line, unless the watchdog needs messages more often."""
CERTIFICATE_CHECK_INTERVAL = 12 * 3600.0
"""Seconds between two checks of the certificates' dates: half a day, since messages about them count days."""


class SystemdStatus:
    """Keeps the status line up to date."""

    def __init__(
        self, service: TunnelService, store: CertificateStore, unobtained: Callable[[], Sequence[str]] = tuple
    ) -> None:
        """`unobtained` returns which host names have no certificate, in a few words each."""
        self._service = service
        self._store = store
        self._failed = ""
        self._unobtained = unobtained
        self._certificates: Sequence[str] = ()

    def __str__(self) -> str:
        tunnels = self._service.tunnels()
        counts = count(len(tunnels), "tunnel"), count(sum(len(tunnel.visitors) for tunnel in tunnels), "visitor")
        kept = ["reservations are not stored"] if self._service.reservations.place == "memory" else []
        missing = self._unobtained()
        more = [f"{len(missing) - 1} more without a certificate"] if len(missing) > 1 else []
        failed = [self._failed] if self._failed else []
        return "; ".join([", ".join(counts), *failed, *kept, *self._certificates, *missing[:1], *more])

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Run a reload or a restart in the block. If it fails, the status line says so until another one succeeds."""
        try:
            yield
        except TunneldError as error:
            self._failed = f"{what} failed, nothing changed: {_first_problem(error)}"
            raise
        else:
            self._failed = ""
            self._check_certificates()
        finally:
            self._send()

    async def run(self) -> None:
        """Send the status line until cancelled. With a watchdog, report twice per interval that this task runs, and
        with it the scheduler.
        """
        interval, checked_at = systemd.watchdog_interval(), -math.inf
        while True:
            if trio.current_time() - checked_at >= CERTIFICATE_CHECK_INTERVAL:
                self._check_certificates()
                checked_at = trio.current_time()
            self._send(alive=interval is not None)
            pause = UPDATE_INTERVAL if systemd.is_available() else CERTIFICATE_CHECK_INTERVAL
            await trio.sleep(min(pause, (interval or math.inf) / 2))

    def _check_certificates(self) -> None:
        self._certificates = self._store.expiring()

    def _send(self, *, alive: bool = False) -> None:
        """Send one message, since a manager that hangs costs a second for each. A drain sends its own status."""
        status = "" if self._service.draining else str(self)
        if alive:
            systemd.alive(status)
        elif status:
            systemd.status(status)


def _first_problem(error: TunneldError) -> str:
    """Return the first problem of an error: the status is one line, and the journal has all of them."""
    if isinstance(error, ConfigError) and len(error.problems) > 1:
        return f"{error.problems[0]} (and {len(error.problems) - 1} more)"
    return str(error)
