"""The process: the root nursery, and the one place where everything is put together.

    root
    ├─ signals                 TERM, INT: drain; again: stop.  HUP: reload.  USR1, USR2: hand over, see handover/
    ├─ engine                  every byte of every relay between sockets
    ├─ lobby                   who has yet to show that it is a hidden server, see lobby.py
    ├─ tunnels                 see service/service.py
    ├─ control (lines)         see control/server.py; below each of these three a door with its listeners, see doors.py
    ├─ HTTP face               see control/http
    ├─ carriers                the shared port of the webmux backend, see carriers.py
    └─ ssh                     the shared port of the ssh backend, see ssh/

What each face listens on is in faces.py, how it all ends in endings.py. Every face runs for as long as the daemon does,
also while its door has no listener because it is not enabled: so a reload exchanges listeners and starts or ends
nothing else.

Ending goes through one door, `_end`: a drain, or a handover to the next process; a second `shutdown` stops at once. In
either way the root nursery is cancelled last, which drops whatever is left.
"""

from __future__ import annotations

import os
import resource
import signal
import ssl
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import structlog
import trio

from tunneld import __version__, config, endings, log, net, notify, privileges
from tunneld.backends.shared import Endpoints
from tunneld.config.places import state_folder
from tunneld.config.schema import Settings
from tunneld.control import http
from tunneld.control.commands import executor
from tunneld.control.gate import Gate
from tunneld.control.server import serve_lines
from tunneld.control.strangers import Strangers
from tunneld.doors import Bound
from tunneld.endings import Ending
from tunneld.errors import DrainingError, TunneldError, UsageError
from tunneld.faces import Faces, places
from tunneld.lobby import Lobby
from tunneld.relay import new_engine
from tunneld.relay.limits import DOZE
from tunneld.service import TunnelService
from tunneld.tunnel import STOPPED
from tunneld.tunnel.legacy import ServiceLegacy
from tunneld.wire.lines import Item

if sys.platform == "linux":
    from tunneld import handover

if TYPE_CHECKING:
    import asyncssh

logger = structlog.get_logger("daemon")

CUT = os.EX_TEMPFAIL
"""The exit status when a drain had to cut relays that did not finish in `daemon.drain_timeout`."""

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

GOODBYE = 1.0
"""Seconds for control and HTTP connections to end in order before a handover; relays go on meanwhile."""


async def run(
    settings: Settings, config_path: Path | None, load: Callable[[], Settings], command: Sequence[str] = ()
) -> int:
    """Run the daemon until it is told to end; returns the exit status: 0, or `CUT`.

    `load` reads the settings again for a reload; `config_path` is for people; `command` is how this program was
    started, and is started again.
    Raises `ListenError`, `ShortageError` or `ConfigError` where it cannot start.
    """
    net.raise_descriptor_limit()
    daemon = Daemon(settings, config_path, load, command)
    await daemon.run()
    return daemon.exit_status


class Daemon:
    """The running process, as the control commands see it."""

    def __init__(
        self, settings: Settings, config_path: Path | None, load: Callable[[], Settings], command: Sequence[str] = ()
    ) -> None:
        self.settings = settings
        self.exit_status = os.EX_OK
        self.started_at = trio.current_time()
        self._config_path = config_path
        self._load = load
        self._engine = new_engine(accept_backoff=settings.tunnels.accept_backoff, doze=DOZE)
        self._endpoints = Endpoints()
        self._state = settings.daemon.state or state_folder()
        self._strangers = Strangers(lambda: self.settings.control)
        self._gate = Gate(lambda: self.settings.credential, self._strangers)
        self._lobby = Lobby(self._gate, lambda: self._tls, lambda: self.settings.control.handshake_timeout)
        lobby = self._lobby if sys.platform == "linux" else None  # what it lets in lives in the pump
        self.service = TunnelService(lambda: self.settings, self._engine, self._endpoints, self._state, lobby)
        self._tls: ssl.SSLContext | None = None  # for handshakes that begin from here on
        self._web_tls: ssl.SSLContext | None = None  # the same for the HTTP face
        self._host_key: asyncssh.SSHKey | None = None  # of the SSH port
        self._command = command
        self._faces = Faces()
        self._faces_scope = trio.CancelScope()
        self._faces_gone = trio.Event()
        self._face_nursery: trio.Nursery
        self._serves_ssh = False
        self._ending = Ending.DRAIN
        self._end_asked = trio.Event()
        self._stop = trio.CancelScope()

    async def run(self) -> None:
        """The root nursery. Everything listens before systemd and the log hear that the daemon is ready."""
        self._tls, self._web_tls = _tls_of(self.settings)
        legacy = self._listen()
        self._become_user()
        self._host_key = _host_key_of(self.settings)
        with trio.open_signal_receiver(*SIGNALS) as signals, self._stop:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # the process before this one held them back for us
            async with trio.open_nursery() as root:
                root.start_soon(self._obey, signals, root)
                await root.start(self._engine.run)
                await root.start(self._lobby.run)
                await root.start(self.service.run)
                await self.service.take_over(legacy)
                self._drain_revoked()
                await root.start(self._run_faces)
                if (interval := notify.watchdog_interval()) is not None:
                    root.start_soon(_feed_watchdog, interval)
                if sys.platform == "linux":
                    handover.settle()
                notify.ready()
                logger.info("ready", version=__version__, pid=os.getpid(), tunnels=self.settings.tunnels.ports)
                await self._end_asked.wait()
                await (self._drain() if self._ending is Ending.DRAIN else self._hand_over(self._ending))
                root.cancel_scope.cancel()
        notify.stopping()
        logger.info("stopped", exit_status=self.exit_status)

    # What the control commands ask

    def status(self) -> Item:
        """The process in one line of facts; times in seconds, sizes in octets."""
        tunnels = self.service.tunnels()
        up, down = self.service.octets
        soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        return {
            "version": __version__,
            "pid": os.getpid(),
            "phase": "draining" if self.service.draining else "ready",
            "uptime": int(trio.current_time() - self.started_at),
            "tunnels": len(tunnels),
            "opened": self.service.opened,
            "visitors": sum(len(tunnel.visitors) for tunnel in tunnels),
            "served": self.service.served,
            "up": up,
            "down": down,
            "descriptors": net.open_descriptors(),
            "max_descriptors": soft,
            "strangers": len(self._strangers),
            "strangers_refused": self._strangers.refusals.total(),
            "penalised": self._strangers.penalised(trio.current_time()),
            "tasks": trio.lowlevel.current_statistics().tasks_living,
            "reservations": len(self.service.addresses.book),
            "ssh_host_key": self._host_key.get_fingerprint() if self._host_key is not None else None,
            "config": str(self._config_path or "built-in defaults"),
            "state": self.service.addresses.place,
        }

    def reload(self) -> Sequence[Item]:
        """Read the configuration file again, and the certificates it names; what can change without a restart applies
        now, listeners included. Raises `ConfigError`, `ListenError` or `ShortageError`, and has changed nothing then.
        """
        with notify.reloading():
            loaded = self._load()
            changes, settings = config.diff(self.settings, loaded), config.reloaded(self.settings, loaded)
            tls, host_key = _tls_of(settings), self._host_key or _host_key_of(settings)
            bound = self._faces.bind(self.settings, settings)
            self.settings, self._host_key = settings, host_key  # from here on nothing can fail
            self._tls, self._web_tls = tls
            self._exchange(bound)
            if host_key is not None and not self._serves_ssh:
                self._face_nursery.start_soon(self._serve_ssh, host_key)
            log.configure(settings.log)
            self._drain_revoked()
        for change in changes:
            logger.info("setting changed", change=str(change))
        return [
            {"key": change.key, "old": str(change.old), "new": str(change.new), "needs_restart": not change.live}
            for change in changes
        ]

    def shutdown(self, *, drain: bool) -> None:
        """End: the first time with `drain` lets relays finish, everything else stops now."""
        if drain and not self.service.draining:
            self.service.draining = True
            self._end(Ending.DRAIN)
        else:
            self._cut()

    async def restart(self) -> None:
        """Begin to turn into the program as it is now on the disk, with its configuration as it is now: everything
        that can go along does. First the new program is asked whether it would start, then its configuration is
        applied here, listeners included: whatever could fail fails before anybody is let go of.

        Raises `DrainingError`, `UsageError` where this cannot be done, and what `reload` raises.
        """
        if self.service.draining or self.service.leaving:
            raise DrainingError("could not restart: the relay is ending already")
        if sys.platform != "linux" or not self._command:
            raise UsageError("could not restart: this system cannot hand connections over, so stop and start instead")
        await endings.check_program(self._command)
        privileges.identity(self._load())
        self.reload()
        self._end(Ending.BECOME)

    # Inside

    def _end(self, ending: Ending) -> None:
        """The first ending that is asked for is it, but a drain comes before everything that has not begun."""
        if not self._end_asked.is_set() or ending is Ending.DRAIN:
            self._ending = ending
        self._end_asked.set()

    def _listen(self) -> ServiceLegacy:
        """Let each face have its listeners: systemd's, those of the process before this one, or new ones. Returns the
        tunnels of that process.
        """
        enabled = [face for face, place in places(self.settings).items() if place is not None]
        given, estate = endings.received(enabled)
        kept, still_given = (estate.faces, estate.given) if estate is not None else ({}, frozenset[str]())
        self._exchange(self._faces.begin(self.settings, given, kept, still_given))
        return estate.service if estate is not None else ServiceLegacy()

    def _become_user(self) -> None:
        """Give root's rights up, now that everything listens."""
        who = privileges.identity(self.settings)
        if who is None:
            if os.geteuid() == 0:
                logger.warning("this daemon runs as root and need not: name somebody without rights as daemon.user")
            return
        was_root = os.geteuid() == 0
        privileges.become(who, self._state, low_ports=privileges.wants_low_ports(self.settings))
        if was_root:
            privileges.tell_environment(self._config_path, self._state)
            logger.info("became another user", user=who.name, group=who.gid)
        for key, path, reason in privileges.unreadable(self.settings, self._config_path):
            logger.warning("a reload could not read a file", key=key, path=str(path), user=who.name, reason=reason)

    def _drain_revoked(self) -> None:
        self.service.drain_revoked({credential.name for credential in self.settings.credential})

    async def _run_faces(self, *, task_status: trio.TaskStatus[None]) -> None:
        """The branch that a handover ends before the tunnels."""
        try:
            with self._faces_scope:
                async with trio.open_nursery() as self._face_nursery:
                    await self._open_faces(self._face_nursery)
                    task_status.started()
        finally:
            self._faces_gone.set()

    async def _open_faces(self, root: trio.Nursery) -> None:
        doors, tls = self._faces.doors, lambda: self._tls
        await root.start(serve_lines, doors["control"], lambda: self.settings.control, tls, executor(self), self._gate)
        await root.start(http.serve, doors["http"], self, self._gate, lambda: self._web_tls)
        if sys.platform == "linux":
            from tunneld.carriers import serve_carriers  # noqa: PLC0415  # Linux only, like the pump

            await root.start(
                serve_carriers,
                doors["webmux"],
                lambda: self.settings.webmux,
                self._lobby,
                self._endpoints,
                self._engine,
            )
        if self._host_key is not None:
            await root.start(self._serve_ssh, self._host_key)

    async def _serve_ssh(
        self, key: asyncssh.SSHKey, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """From the first time that it is enabled on; its import takes half a second, which others need not wait."""
        from tunneld.relay.pump import Pump  # noqa: PLC0415  # Linux only
        from tunneld.ssh.port import serve_ssh  # noqa: PLC0415

        assert isinstance(self._engine, Pump)
        self._serves_ssh = True
        await serve_ssh(
            self._faces.doors["ssh"],
            lambda: self.settings.ssh,
            key,
            self.service,
            self._lobby,
            self._engine,
            self._gate,
            task_status=task_status,
        )

    def _exchange(self, bound: Bound) -> None:
        """Let the faces listen there, and tell the tunnels where their shared ports are."""
        schemes = {
            "control": "tls" if self._tls else "tcp",
            "http": "https" if self._web_tls else "http",
            "webmux": "webmuxs" if self._tls else "webmux",
            "ssh": "ssh",
        }
        self._faces.exchange(bound, schemes.__getitem__)
        for backend in ("webmux", "ssh"):
            self._endpoints.listen(backend, schemes[backend], self._faces.doors[backend].port)

    async def _obey(self, signals: AsyncIterator[int], root: trio.Nursery) -> None:
        async for number in signals:
            logger.info("signal", name=signal.Signals(number).name)
            match number:
                case signal.SIGHUP:
                    self._reload_by_signal()
                case signal.SIGUSR1:
                    self._store_by_signal()
                case signal.SIGUSR2:
                    root.start_soon(self._restart_by_signal)
                case _:
                    self.shutdown(drain=True)

    async def _restart_by_signal(self) -> None:
        try:
            await self.restart()
        except TunneldError as error:
            logger.warning("restart failed, nothing changed", reason=str(error))

    def _store_by_signal(self) -> None:
        """Systemd ends this process in order to start another one: it keeps for that what goes along."""
        if endings.is_kept():
            self._end(Ending.STORE)
        else:
            logger.warning("nobody keeps connections for the next process (FDSTORE), so they are drained")
            self.shutdown(drain=True)

    def _reload_by_signal(self) -> None:
        """Nobody waits for an answer to a signal: the log gets it."""
        try:
            self.reload()
        except TunneldError as error:
            logger.warning("reload failed, nothing changed", reason=str(error))

    async def _hand_over(self, ending: Ending) -> None:
        """Control and HTTP connections end in order first, while relays go on; then everything goes along at once."""
        given, faces = self._faces.given, self._faces.leave()
        self._faces_scope.cancel()
        with trio.move_on_after(GOODBYE):
            await self._faces_gone.wait()
        if self.service.draining:  # somebody was told to stop it meanwhile
            for listener in chain.from_iterable(faces.values()):
                listener.close()
            await self._drain()
        else:
            await endings.hand_over(ending, self._command, SIGNALS, faces, given, self.service)

    async def _drain(self) -> None:
        await endings.drain(self.service, self.settings.daemon.drain_timeout)
        self._cut()

    def _cut(self) -> None:
        """Stop now; say so in the exit status where somebody was still being served after a drain was asked for."""
        if self.service.draining and any(tunnel.visitors for tunnel in self.service.tunnels()):
            self.exit_status = CUT
        for tunnel in self.service.tunnels():
            tunnel.close(STOPPED)  # before its relays are dropped, which would pass for a drain that is done
        self._stop.cancel()


async def _feed_watchdog(interval: float) -> None:
    """Say twice in an interval that the scheduler, which runs everything here, has come round."""
    while True:
        notify.alive()
        await trio.sleep(interval / 2)


def _host_key_of(settings: Settings) -> asyncssh.SSHKey | None:
    """The key of the SSH port, made where there is none. Raises `ConfigError`."""
    if places(settings)["ssh"] is None:
        return None
    from tunneld.ssh.hostkey import load_or_make, place  # noqa: PLC0415

    return load_or_make(place(settings))


def _tls_of(settings: Settings) -> tuple[ssl.SSLContext | None, ssl.SSLContext | None]:
    """Contexts of the control port and of the HTTP face, made anew from the files, which may be others behind the same
    names. Raises `ConfigError`.
    """
    control, web = settings.control.tls, settings.http.tls
    return (
        net.server_tls_context(control) if control else None,
        net.server_tls_context(web, table="http.tls") if web else None,
    )
