"""The process: the root nursery, and the one place where everything is put together.

    root
    ├─ signals                 TERM, INT: drain; again: stop.  HUP: reload.  USR1, USR2: hand over, see handover/
    ├─ engine                  every byte of every relay between sockets
    ├─ lobby                   who has yet to show that it is a hidden server, see lobby.py
    ├─ tunnels                 see service/service.py
    ├─ front                   control, HTTP and shared ports, see front.py
    └─ standing                what systemd is told, see standing.py

How it all ends is in endings.py, what signals mean in signals.py.

Ending goes through one door, `_end`: a drain, or a handover to the next process; a second `shutdown` stops at once. In
either way the root nursery is cancelled last, which drops whatever is left.
"""

from __future__ import annotations

import faulthandler
import os
import resource
import signal
import sys
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path

import structlog
import trio

from tunneld import __version__, config
from tunneld.auth.authenticator import Authenticator
from tunneld.auth.handshakes import HandshakeSupervisor
from tunneld.auth.preauth import PreauthLimiter
from tunneld.backends import BACKENDS
from tunneld.config.places import state_folder
from tunneld.config.schema import Settings
from tunneld.daemon import ending, log, privileges, systemd
from tunneld.daemon.ending import DaemonEnding
from tunneld.daemon.servers import Servers
from tunneld.daemon.signals import SIGNALS, obey
from tunneld.daemon.status import SystemdStatus
from tunneld.directory.service import TunnelService
from tunneld.engine import new_engine
from tunneld.engine.limits import POLL_TIMEOUT
from tunneld.errors import DrainingError, UsageError
from tunneld.net import sockets
from tunneld.tunnel.keys import KeyRegistry
from tunneld.tunnel.tunnel import STOPPED
from tunneld.wire.lines import Item

if sys.platform == "linux":
    from tunneld.daemon import handover

logger = structlog.get_logger("daemon")

CUT = os.EX_TEMPFAIL
"""The exit status when a drain had to cut relays that did not finish in `daemon.drain_timeout`."""


async def run(
    settings: Settings, config_path: Path | None, load: Callable[[], Settings], command: Sequence[str] = ()
) -> int:
    """Run the daemon until it is told to end; returns the exit status: 0, or `CUT`.

    `load` reads the settings again for a reload; `config_path` is for people; `command` is how this program was
    started, and is started again.
    Raises `ListenError`, `ShortageError` or `ConfigError` where it cannot start.
    """
    sockets.raise_descriptor_limit()
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
        self._engine = new_engine(
            accept_backoff=settings.tunnels.accept_backoff,
            poll_timeout=POLL_TIMEOUT,
            busy_poll=settings.daemon.spin,
            descriptors=sockets.descriptors_for_tunnels(),
        )
        self._state = settings.daemon.state or state_folder()
        self._strangers = PreauthLimiter(lambda: self.settings.control)
        gate, endpoints = Authenticator(lambda: self.settings.credential, self._strangers), KeyRegistry()
        self._lobby = HandshakeSupervisor(
            gate, lambda: self._front.certificates.control, lambda: self.settings.control.handshake_timeout
        )
        lobby = self._lobby if sys.platform == "linux" else None  # what it lets in lives in the pump
        self.service = TunnelService(lambda: self.settings, self._engine, BACKENDS, endpoints, self._state, lobby)
        self._front = Servers(self, self._engine, endpoints, gate, self._lobby)
        self._standing = SystemdStatus(self.service, lambda: self._front.certificates.shown(self.settings))
        self._command = command
        self._ending = DaemonEnding.DRAIN
        self._end_asked = trio.Event()
        self._stop = trio.CancelScope()

    async def run(self) -> None:
        """The root nursery. Everything listens before systemd and the log hear that the daemon is ready."""
        legacy = self._front.listen(self.settings)
        self._become_user()
        self._front.take_host_key(self.settings)
        with trio.open_signal_receiver(*SIGNALS) as signals, self._stop:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # the process before this one held them back for us
            async with trio.open_nursery() as root:
                root.start_soon(obey, signals, self, root)
                await root.start(self._engine.run)
                await root.start(self._lobby.run)
                await root.start(self.service.run)
                await self.service.adopt(legacy)
                self._drain_revoked()
                await root.start(self._front.run)
                if systemd.watchdog_interval() is not None:
                    faulthandler.enable()  # systemd ends who hangs with SIGABRT: then the log says where it hung
                if sys.platform == "linux":
                    handover.settle()
                systemd.ready()
                root.start_soon(self._standing.tell)
                logger.info("ready", version=__version__, pid=os.getpid(), tunnels=self.settings.tunnels.ports)
                await self._end_asked.wait()
                await (self._drain() if self._ending is DaemonEnding.DRAIN else self._hand_over(self._ending))
                root.cancel_scope.cancel()
        systemd.stopping()
        logger.info("stopped", exit_status=self.exit_status)

    # What the control commands ask

    def status(self) -> Item:
        """The process in one line of facts; times in seconds, sizes in octets."""
        tunnels = self.service.tunnels()
        up, down = self.service.octets
        host_key = self._front.certificates.host_key
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
            "descriptors": sockets.open_descriptors(),
            "max_descriptors": soft,
            "strangers": len(self._strangers),
            "strangers_refused": self._strangers.refusals.total(),
            "penalised": self._strangers.penalised(trio.current_time()),
            "tasks": trio.lowlevel.current_statistics().tasks_living,
            "reservations": len(self.service.reservations.table),
            "ssh_host_key": host_key.get_fingerprint() if host_key is not None else None,
            "config": str(self._config_path or "built-in defaults"),
            "state": self.service.reservations.place,
        }

    def reload(self) -> Sequence[Item]:
        """Read the configuration file again, and the certificates it names; what can change without a restart applies
        now, listeners included. Raises `ConfigError`, `ListenError` or `ShortageError`, and has changed nothing then.
        """
        with self._standing.attempt("reload"), systemd.reloading():
            loaded = self._load()
            changes, settings = config.diff(self.settings, loaded), config.reloaded(self.settings, loaded)
            prepared = self._front.prepare(self.settings, settings)
            self.settings = settings  # from here on nothing can fail
            self._front.change(prepared)
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
            self._end(DaemonEnding.DRAIN)
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
        with self._standing.attempt("restart"):
            await ending.check_program(self._command)
            privileges.identity(self._load())
            self.reload()
        self._end(DaemonEnding.BECOME)

    def store(self) -> None:
        """Systemd ends this process in order to start another one: it keeps for that what goes along."""
        self._end(DaemonEnding.STORE)

    # Inside

    def _end(self, ending: DaemonEnding) -> None:
        """The first ending that is asked for is it, but a drain comes before everything that has not begun."""
        if not self._end_asked.is_set() or ending is DaemonEnding.DRAIN:
            self._ending = ending
        self._end_asked.set()

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

    async def _hand_over(self, how: DaemonEnding) -> None:
        """Control and HTTP connections end in order first, while relays go on; then everything goes along at once."""
        faces, given = await self._front.export()
        if self.service.draining:  # somebody was told to stop it meanwhile
            for listener in chain.from_iterable(faces.values()):
                listener.close()
            await self._drain()
        else:
            await ending.hand_over(how, self._command, SIGNALS, faces, given, self.service)

    async def _drain(self) -> None:
        await ending.drain(self.service, self.settings.daemon.drain_timeout)
        self._cut()

    def _cut(self) -> None:
        """Stop now; say so in the exit status where somebody was still being served after a drain was asked for."""
        if self.service.draining and any(tunnel.visitors for tunnel in self.service.tunnels()):
            self.exit_status = CUT
        for tunnel in self.service.tunnels():
            tunnel.close(STOPPED)  # before its relays are dropped, which would pass for a drain that is done
        self._stop.cancel()
