"""The listeners of the daemon's own services, and what a reload changes about them.

A listener comes from one of three sources. Most are bound as the configuration says. systemd opens some (socket
activation), and these stay whatever `host` and `port` say. The previous process hands over others, which are used
further if the configuration still has their address.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Mapping, Sequence

import structlog

from tunneld.config.problems import check_reach
from tunneld.config.schema import Settings
from tunneld.net.listeners import BindAddress, Bound, ReloadableListener, bind_again
from tunneld.net.sockets import describe

log = structlog.get_logger("daemon")

SERVICES = ("control", "http", "webmux", "ssh", "egtp", "names-http", "names-https")
"""Services with a port of their own: as the tables of the configuration are called, and systemd's sockets."""

HAS_PUMP = sys.platform == "linux"
"""Whether this system has the pump, without which there are no carriers and no host names."""

ACTIVATED = BindAddress("", 0)
"""Stands for the address of a service with listeners of systemd; no configured address is equal to it."""

INHERITED = BindAddress("", -1)
"""Stands for the address of a service with listeners of the previous process; no configured address is equal to it."""

ListenerSockets = Mapping[str, Sequence[socket.socket]]


class Listeners:
    """One `ReloadableListener` for each service, and the services with listeners of systemd."""

    def __init__(self) -> None:
        self.by_service = {service: ReloadableListener(service) for service in SERVICES}
        self.activated: frozenset[str] = frozenset()

    def begin(
        self,
        settings: Settings,
        activated: ListenerSockets,
        inherited: ListenerSockets,
        still_activated: frozenset[str],
    ) -> Bound:
        """Bind for the first time. Pass the result to `exchange`.

        Args:
            settings: the configuration.
            activated: listeners that systemd opened.
            inherited: listeners of the previous process.
            still_activated: the services among the latter with listeners of systemd.

        Raises `ListenError` or `ShortageError`, and `ConfigError` if an address that systemd opened is public and its
        service is not protected.
        """
        self.activated = frozenset(activated) | still_activated
        now: dict[str, BindAddress | None] = dict.fromkeys(SERVICES)
        for service in SERVICES:
            if listeners := activated.get(service) or inherited.get(service):
                self.by_service[service] = ReloadableListener(service, listeners)
                now[service] = ACTIVATED if service in self.activated else INHERITED
        for service in activated:
            for listener in inherited.get(service, ()):
                listener.close()
        plan = self._plan(settings)
        bound = bind_again(self.by_service, now, plan)
        kept = {
            service: self.by_service[service].listeners
            for service in SERVICES
            if now[service] == plan[service] == ACTIVATED
        }
        return kept | bound

    def bind(self, now: Settings, then: Settings) -> Bound:
        """Bind the addresses that are new in `then`. Nothing changes until `exchange`. Raises like `begin`."""
        return bind_again(self.by_service, self._plan(now), self._plan(then))

    def exchange(self, bound: Bound, scheme: Callable[[str], str]) -> None:
        """Exchange listeners, close those no longer used, and log the new addresses."""
        for service, listeners in bound.items():
            self.by_service[service].exchange(listeners)
            event = f"{service} listens" if listeners else f"{service} does not listen"
            log.info(event, uri=describe(listeners, scheme(service)))
            if not listeners:
                self.activated -= {service}

    def export(self) -> dict[str, list[socket.socket]]:
        """Return all listeners, for a new owner. Nothing is accepted from here on."""
        return {service: listener.export() for service, listener in self.by_service.items()}

    def _plan(self, settings: Settings) -> dict[str, BindAddress | None]:
        plan = bind_addresses(settings)
        for service in self.activated:
            if plan[service] is not None:
                plan[service] = ACTIVATED
                for listener in self.by_service[service].listeners:
                    check_reach(settings, service, listener.getsockname()[0])
        return plan


def bind_addresses(settings: Settings) -> dict[str, BindAddress | None]:
    """Return the address of each of `SERVICES`; None if it is disabled."""
    control, web, webmux, ssh = settings.control, settings.http, settings.webmux, settings.ssh
    egtp = settings.egtp
    return {
        "control": BindAddress(control.host, control.port),
        "http": BindAddress(web.host, web.port) if web.enabled else None,
        "webmux": _shared(settings, webmux.host, webmux.port) if webmux.enabled else None,
        "ssh": _shared(settings, ssh.host, ssh.port) if ssh.enabled else None,
        "egtp": _shared(settings, egtp.host, egtp.port) if egtp.enabled else None,
        "names-http": settings.names.http_address if HAS_PUMP else None,
        "names-https": settings.names.https_address if HAS_PUMP else None,
    }


def _shared(settings: Settings, host: str | None, port: int) -> BindAddress | None:
    """Return the address of a shared port; None on systems without the pump, which cannot have carriers."""
    return BindAddress(settings.tunnels.host if host is None else host, port) if HAS_PUMP else None
