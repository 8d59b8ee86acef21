"""The daemon: its root nursery, and the one place where all parts are put together.

    root
    ├─ signals                 TERM, INT: drain; again: stop.  HUP: reload.  USR1, USR2: restart; see signals.py
    ├─ engine                  all data of relayed connections, see engine/
    ├─ handshakes              agents that have not authenticated yet, see auth/handshakes.py
    ├─ tunnels                 see directory/service.py
    ├─ servers                 control port, HTTP and shared ports, see servers.py
    ├─ certificates            for host names, see acme/manager.py
    └─ systemd status          see status.py
    journals                   records of visitors, and past events; outside the root: they end last, see journals.py

The daemon ends with a drain or with a handover to the next process (ending.py); a second `shutdown` stops it at once.
In each case the root nursery is cancelled last, which drops all remaining connections.
"""

from __future__ import annotations

import faulthandler
import os
import resource
import signal
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from itertools import chain
from pathlib import Path

import structlog
import trio

from tunneld import __version__, config, systemd
from tunneld.acme.manager import CertificateManager
from tunneld.acme.state import certificate_folder
from tunneld.auth.authenticator import Authenticator
from tunneld.auth.handshakes import HandshakeSupervisor
from tunneld.auth.preauth import PreauthLimiter
from tunneld.backends import BACKENDS
from tunneld.config.permissions import writable_by_group
from tunneld.config.places import state_folder
from tunneld.config.ports import services_among_tunnels
from tunneld.config.salts import read_salt_key, store_salt_key
from tunneld.config.schema import Settings
from tunneld.config.wording import literal
from tunneld.daemon import ending, log, privileges
from tunneld.daemon.ending import DaemonEnding
from tunneld.daemon.journals import Journals
from tunneld.daemon.listeners import HAS_PUMP
from tunneld.daemon.servers import Servers
from tunneld.daemon.signals import SIGNALS, handle_signals
from tunneld.daemon.status import SystemdStatus
from tunneld.directory.requester import account_of
from tunneld.directory.service import TunnelService
from tunneld.egtp.passing import PassingService
from tunneld.engine import new_engine
from tunneld.engine.limits import POLL_TIMEOUT
from tunneld.errors import DrainingError, UsageError
from tunneld.net import sockets
from tunneld.net.address import HostName
from tunneld.policy.bans import Bans
from tunneld.sites.guard import GuardServices, GuardSettings
from tunneld.sites.links import ShareLinks
from tunneld.sites.names import SharedNames
from tunneld.tls.store import CertificateStore
from tunneld.tunnel.keys import KeyRegistry
from tunneld.tunnel.snapshot import ServiceSnapshot
from tunneld.tunnel.visitors import STOPPED
from tunneld.wire.lines import Item

if sys.platform == "linux":
    from tunneld.daemon import handover

logger = structlog.get_logger("daemon")

CUT = os.EX_TEMPFAIL
"""The exit status after a drain that had to cut connections when `daemon.drain_timeout` was over."""


async def run(
    settings: Settings, config_path: Path | None, load: Callable[[], Settings], command: Sequence[str] = ()
) -> int:
    """Run the daemon until it is stopped. Returns the exit status: 0, or `CUT`.

    Args:
        settings: the configuration to start with.
        config_path: its file, for messages and for the program of a restart.
        load: reads the configuration again, for a reload.
        command: the command line that starts this program, for a restart.

    Raises `ListenError`, `ShortageError` or `ConfigError` if the daemon cannot start.
    """
    sockets.raise_descriptor_limit()
    daemon = Daemon(settings, config_path, load, command)
    await daemon.run()
    return daemon.exit_status


class Daemon:
    """The running daemon. Control commands (`DaemonControl`) and signals act on it."""

    def __init__(
        self, settings: Settings, config_path: Path | None, load: Callable[[], Settings], command: Sequence[str] = ()
    ) -> None:
        self.settings = settings
        self.exit_status = os.EX_OK
        self.started_at = trio.current_time()
        self._config_path = config_path
        self._load = load
        self.engine = new_engine(
            accept_backoff=settings.tunnels.accept_backoff,
            poll_timeout=POLL_TIMEOUT,
            busy_poll=settings.daemon.spin,
            descriptors=sockets.descriptors_for_tunnels(),
        )
        self._state = settings.daemon.state or state_folder()
        self.certificates = CertificateStore(certificate_folder(self._state) if self._state is not None else None)
        self.certificate_orders = CertificateManager(
            self.certificates,
            lambda: self.settings.acme,
            self._state,
            domain=lambda: self.settings.names.domain,
            challenges=lambda: self.settings.names.challenges,
        )
        bans = Bans()
        self._preauth = PreauthLimiter(lambda: self.settings.control, bans=bans)
        self._salt_key = read_salt_key(self._state)
        self._authenticator = authenticator = Authenticator(
            lambda: self.settings.credential, self._preauth, salt_key=self._salt_key
        )
        keys = KeyRegistry()
        self.handshakes = HandshakeSupervisor(
            authenticator,
            lambda: self.certificates.port("control.tls"),
            lambda: self.settings.control.handshake_timeout,
        )
        handshakes = self.handshakes if HAS_PUMP else None  # agents' connections need the pump
        self.names = self._shared_names() if HAS_PUMP else None
        if self.names is not None:
            self._order_certificates(self.names)
        self.service = TunnelService(
            lambda: self.settings,
            self.engine,
            BACKENDS,
            keys,
            self._state,
            handshakes,
            self.names,
            bans,
            lambda: self.servers.identity,
        )
        self.servers = Servers(self, self.engine, keys, authenticator, self.handshakes, self.certificates, self.names)
        self.journals = Journals(lambda: self.settings, self._state, self.service)
        self._systemd_status = SystemdStatus(self.service, self.certificates, self.certificate_orders.problems)
        self._command = command
        self._ending = DaemonEnding.DRAIN
        self._end_requested = trio.Event()
        self._stop = trio.CancelScope()

    async def run(self) -> None:
        """Run the root nursery. All ports are open before systemd and the log report that the daemon is ready."""
        self._warn_of_configuration()
        snapshot = self.servers.listen(self.settings)
        self._become_user()
        store_salt_key(self._state, self._salt_key)
        self.servers.load_keys(self.settings)
        with trio.open_signal_receiver(*SIGNALS) as signals:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # the previous program blocked them before execve
            async with self.journals.running():
                with self._stop:
                    await self._serve(signals, snapshot)
        systemd.stopping()
        logger.info("stopped", exit_status=self.exit_status)

    async def _serve(self, signals: AsyncIterator[int], snapshot: ServiceSnapshot) -> None:
        async with trio.open_nursery() as root:
            root.start_soon(handle_signals, signals, self, root)
            await root.start(self.engine.run)
            self.engine.set_unacknowledged_timeout(self.settings.tunnels.unacknowledged_timeout or 0.0)
            await root.start(self.handshakes.run)
            await root.start(self.service.run)
            await self.service.adopt(snapshot)
            self._drain_revoked()
            await root.start(self.servers.run)
            await root.start(self.certificate_orders.run)
            if systemd.watchdog_interval() is not None:
                faulthandler.enable()  # systemd sends SIGABRT to a process that hangs: log its stack trace
            if sys.platform == "linux":
                handover.release_stored()
            systemd.ready()
            root.start_soon(self._systemd_status.run)
            root.start_soon(self.service.loop_delay.run)
            logger.info("ready", version=__version__, pid=os.getpid(), tunnels=self.settings.tunnels.ports)
            await self._end_requested.wait()
            await (self._drain() if self._ending is DaemonEnding.DRAIN else self._hand_over(self._ending))
            root.cancel_scope.cancel()

    def _order_certificates(self, names: SharedNames) -> None:
        """Let host names get certificates from when a tunnel takes them until it frees them."""
        orders = self.certificate_orders
        names.on_taken = lambda name, owner: orders.want(name.name, account_of(owner))
        names.on_freed = lambda name, _owner: orders.unwant(name.name)
        names.obtains_certificates = lambda: self.settings.acme.enabled
        names.last_failure = orders.failure
        orders.on_failed = self._on_certificate_failed

    def _on_certificate_failed(self, name: str, reason: str) -> None:
        """Tell the owners of tunnels with this host name; for the relay's own wildcard only its admins."""
        affected: list[str | None] = [
            tunnel.id
            for tunnel in self.service.tunnels()
            if any(isinstance(each, HostName) and each.name == name for each in tunnel.addresses)
        ]
        for tunnel in affected or [None]:
            self.service.events.publish("certificate", id=tunnel, host=name, reason=reason)

    # Control commands

    def status(self) -> Item:
        """Return facts about the process: counts, times in seconds, traffic in bytes."""
        tunnels = self.service.tunnels()
        up, down = self.service.live.octets
        host_key = self.servers.host_key
        soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        return {
            "version": __version__,
            "pid": os.getpid(),
            "phase": "draining" if self.service.draining else "ready",
            "uptime": int(trio.current_time() - self.started_at),
            "tunnels": len(tunnels),
            "opened": self.service.live.opened,
            "visitors": sum(len(tunnel.visitors) for tunnel in tunnels),
            "served": self.service.live.served,
            "up": up,
            "down": down,
            "descriptors": sockets.open_descriptors(),
            "max_descriptors": soft,
            "strangers": len(self._preauth),
            "strangers_refused": self._preauth.refusals.total(),
            "penalised": self._preauth.penalised(trio.current_time()),
            "tasks": trio.lowlevel.current_statistics().tasks_living,
            "reservations": len(self.service.reservations.table),
            "ssh_host_key": host_key.get_fingerprint() if host_key is not None else None,
            "egtp_node": str(identity.id) if (identity := self.servers.identity) is not None else None,
            "config": str(self._config_path or "built-in defaults"),
            "state": self.service.reservations.place,
            **self._mail_usage(),
        }

    def _mail_usage(self) -> Item:
        """Of the nodes that may use the relay, if there are any."""
        has_nodes = any(credential.nodes for credential in self.settings.credential)
        return self.mail.usage() if self.mail is not None and has_nodes else {}

    @property
    def mail(self) -> PassingService | None:
        """The messages of EGTP nodes; see `DaemonControl`."""
        return self.servers.mail

    def penalties(self) -> Sequence[Item]:
        """The penalties in force; see `DaemonControl`."""
        return self._authenticator.penalties()

    def pardon(self, address: str) -> bool:
        """Forget the failed logins from an address; see `DaemonControl`."""
        return self._preauth.pardon(address)

    def reload(self) -> Sequence[Item]:
        """Read the configuration and its certificates again, and apply what can change without a restart, listeners
        included. Returns the keys that changed.

        Raises `ConfigError`, `ListenError` or `ShortageError`, and then nothing has changed.
        """
        with self._systemd_status.attempt("reload"), systemd.reloading():
            loaded = self._load()
            changes, settings = config.diff(self.settings, loaded), config.reloaded(self.settings, loaded)
            prepared = self.servers.prepare(self.settings, settings)
            self.settings = settings  # nothing can fail from here on
            self.servers.apply(prepared)
            self.engine.set_unacknowledged_timeout(settings.tunnels.unacknowledged_timeout or 0.0)
            self.service.apply_settings()
            self.journals.reconfigure()
            self.certificate_orders.reconfigure()
            log.configure(settings.log)
            self._warn_of_configuration()
            self._drain_revoked()
        for change in changes:
            logger.info("setting changed", change=str(change))
        return [
            {
                "key": change.key,
                "old": None if change.old is None else literal(change.old),
                "new": None if change.new is None else literal(change.new),
                "needs_restart": not change.live,
                "applies": change.applies,
            }
            for change in changes
        ]

    def shutdown(self, *, drain: bool) -> None:
        """Stop the daemon. The first call with `drain` lets connections finish; any other call cuts them now."""
        if drain and not self.service.draining:
            self.service.draining = True
            self._end(DaemonEnding.DRAIN)
        else:
            self._cut()

    async def restart(self) -> None:
        """Begin to replace this process by the program and the configuration now on disk, keeping what can be kept.

        First the new program checks its configuration, and this process applies it, listeners included, so that an
        error is found while all connections are still served.

        Raises `DrainingError`, `UsageError` if this system cannot do it, and what `reload` raises.
        """
        if self.service.draining or self.service.leaving:
            raise DrainingError("could not restart: the relay is already stopping")
        if sys.platform != "linux" or not self._command:
            raise UsageError("could not restart: connections cannot be handed over on this system; stop and start it")
        with self._systemd_status.attempt("restart"):
            await ending.check_program(self._command)
            privileges.identity(self._load())
            self.reload()
        self._end(DaemonEnding.BECOME)

    def on_signal(self, name: str, verb: str) -> None:
        """A signal asks for what a verb does: tell watchers."""
        self.service.events.publish("request", verb=verb, signal=name)

    def store(self) -> None:
        """End, and let systemd keep the connections for the process that it starts next."""
        self._end(DaemonEnding.STORE)

    # Internals

    def _shared_names(self) -> SharedNames:
        links = ShareLinks(lambda: self.settings.names.max_share, self._state)
        guards = GuardServices(lambda: _guard_settings(self.settings), links)
        return SharedNames(lambda: self.settings.names, self.certificates.has_name, guards)

    def _end(self, ending: DaemonEnding) -> None:
        """Request an ending. The first request wins, except that a drain replaces a handover that has not begun."""
        if not self._end_requested.is_set() or ending is DaemonEnding.DRAIN:
            self._ending = ending
        self._end_requested.set()

    def _become_user(self) -> None:
        """Drop root privileges. All ports are open by now."""
        user = privileges.identity(self.settings)
        if user is None:
            if os.geteuid() == 0:
                logger.warning("running as root is unnecessary; set daemon.user to an unprivileged account")
            return
        was_root = os.geteuid() == 0
        privileges.become(user, self._state, low_ports=privileges.wants_low_ports(self.settings))
        if was_root:
            privileges.export_paths(self._config_path, self._state)
            logger.info("changed user", user=user.name, group=user.gid)
        for key, path, reason in privileges.unreadable(self.settings, self._config_path):
            facts = {"key": key, "path": str(path), "user": user.name, "reason": reason}
            logger.warning("cannot read a file that a reload needs", **facts)

    def _warn_of_configuration(self) -> None:
        for warning in writable_by_group(self.settings, self._config_path):
            logger.warning("a file of the configuration can be changed by other users", problem=warning)
        for warning in services_among_tunnels(self.settings):
            logger.warning("a service has one of the ports for tunnels", problem=warning)

    def _drain_revoked(self) -> None:
        """Drain the tunnels of credentials that are no longer in the configuration."""
        self.service.drain_revoked({credential.name for credential in self.settings.credential})

    async def _hand_over(self, how: DaemonEnding) -> None:
        """End control and HTTP connections while relayed connections go on, then hand over everything at once."""
        listeners, activated = await self.servers.export()
        if self.service.draining:  # a shutdown was requested in the meantime
            for listener in chain.from_iterable(listeners.values()):
                listener.close()
            await self._drain()
        else:
            flush = self.journals.flush
            await ending.hand_over(how, self._command, SIGNALS, listeners, activated, self.service, flush)

    async def _drain(self) -> None:
        await ending.drain(self.service, self.settings.daemon.drain_timeout)
        self._cut()

    def _cut(self) -> None:
        """Stop now. The exit status is `CUT` if a drain was requested and visitors are still connected."""
        if self.service.draining and any(tunnel.visitors for tunnel in self.service.tunnels()):
            self.exit_status = CUT
        for tunnel in self.service.tunnels():
            tunnel.close(STOPPED)  # before its visitors are dropped, which would look like the end of a drain
        self._stop.cancel()


def _guard_settings(settings: Settings) -> GuardSettings:
    """A visitor that guesses passwords gets the penalties of a peer that guesses secrets."""
    control, names = settings.control, settings.names
    return GuardSettings(
        control.penalty,
        control.max_penalty,
        names.forward_auth,
        names.forward_auth_timeout,
        names.forward_auth_cache,
    )
