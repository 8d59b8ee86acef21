"""Which face listens where: the doors of all faces, and what moves between two configurations.

A listener comes from one of three places. Most are bound as the configuration says; systemd gives some (socket
activation), and those stay whatever the configuration says of `host` and `port`; others come along from the process
before this one, and are used where they are where the configuration wants them.
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

SERVICES = ("control", "http", "webmux", "ssh")
"""What listens for itself: the names of tables of the configuration, and of systemd's sockets."""

GIVEN = BindAddress("", 0)
"""Where a face listens that systemd gave its listener; no host of a configuration is the same as this one's."""

KEPT = BindAddress("", -1)
"""Where a face listened in the process before this one; no place of a configuration is the same."""

ListenerSockets = Mapping[str, Sequence[socket.socket]]


class Listeners:
    """The doors, by the names of their faces."""

    def __init__(self) -> None:
        self.doors = {face: ReloadableListener(face) for face in SERVICES}
        self.given: frozenset[str] = frozenset()

    def begin(
        self, settings: Settings, given: ListenerSockets, kept: ListenerSockets, still_given: frozenset[str]
    ) -> Bound:
        """Bind for the first time, of which `exchange` is to be told. `given` are systemd's listeners, `kept` those of
        the process before this one, of which `still_given` were systemd's.

        Raises `ListenError` or `ShortageError`, and `ConfigError` where strangers could reach what they must not.
        """
        self.given = frozenset(given) | still_given
        now: dict[str, BindAddress | None] = dict.fromkeys(SERVICES)
        for face in SERVICES:
            if listeners := given.get(face) or kept.get(face):
                self.doors[face] = ReloadableListener(face, listeners)
                now[face] = GIVEN if face in self.given else KEPT
        for face in given:
            for listener in kept.get(face, ()):
                listener.close()
        plan = self._plan(settings)
        bound = bind_again(self.doors, now, plan)
        return {face: self.doors[face].listeners for face in SERVICES if now[face] == plan[face] == GIVEN} | bound

    def bind(self, now: Settings, then: Settings) -> Bound:
        """Bind what lies between two configurations; nothing has changed until `exchange`. Raises as `begin`."""
        return bind_again(self.doors, self._plan(now), self._plan(then))

    def exchange(self, bound: Bound, scheme: Callable[[str], str]) -> None:
        """Let the faces listen there, and tell; sockets that are not listened on any more are closed."""
        for face, listeners in bound.items():
            self.doors[face].exchange(listeners)
            event = f"{face} listens" if listeners else f"{face} does not listen"
            log.info(event, uri=describe(listeners, scheme(face)))
            if not listeners:
                self.given -= {face}

    def export(self) -> dict[str, list[socket.socket]]:
        """All listeners, for another owner; nobody is accepted any more."""
        return {face: door.export() for face, door in self.doors.items()}

    def _plan(self, settings: Settings) -> dict[str, BindAddress | None]:
        plan = places(settings)
        for face in self.given:
            if plan[face] is not None:
                plan[face] = GIVEN
                for listener in self.doors[face].listeners:
                    check_reach(settings, face, listener.getsockname()[0])
        return plan


def places(settings: Settings) -> dict[str, BindAddress | None]:
    """Where each of `SERVICES` listens; None: nowhere."""
    control, web, webmux, ssh = settings.control, settings.http, settings.webmux, settings.ssh
    return {
        "control": BindAddress(control.host, control.port),
        "http": BindAddress(web.host, web.port) if web.enabled else None,
        "webmux": _shared(settings, webmux.host, webmux.port) if webmux.enabled else None,
        "ssh": _shared(settings, ssh.host, ssh.port) if ssh.enabled else None,
    }


def _shared(settings: Settings, host: str | None, port: int) -> BindAddress | None:
    """Where a shared port is, on systems that have carriers."""
    return BindAddress(settings.tunnels.host if host is None else host, port) if sys.platform == "linux" else None
