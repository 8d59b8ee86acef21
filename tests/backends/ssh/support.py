"""A relay with an SSH port in the test's process, and real ssh clients in processes of their own."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import asyncssh
import trio

from tests.support.peers import PATIENCE
from tests.support.programs import program
from tests.support.system import find_program
from tunneld.auth.authenticator import Authenticator
from tunneld.auth.handshakes import HandshakeSupervisor
from tunneld.auth.preauth import PreauthLimiter
from tunneld.backends import BACKENDS
from tunneld.backends.ssh.port import serve_ssh
from tunneld.backends.ssh.side import SshServerSide
from tunneld.config.credentials import Credential
from tunneld.config.schema import ControlSettings, Settings, SshSettings
from tunneld.control.commands import executor
from tunneld.directory.requester import Requester
from tunneld.directory.service import TunnelService
from tunneld.engine import new_engine
from tunneld.engine.pump import Pump
from tunneld.net import sockets
from tunneld.net.endpoint import Endpoint
from tunneld.net.listeners import ReloadableListener
from tunneld.policy.options import TunnelOptions
from tunneld.tunnel.keys import KeyRegistry
from tunneld.tunnel.tunnel import Tunnel

if TYPE_CHECKING:
    from tunneld.control.verbs import DaemonControl

ME = Requester(host="127.0.0.1", owner="127.0.0.1:9", local_host="127.0.0.1")
HOST_KEY = asyncssh.generate_private_key("ssh-ed25519")


@dataclass
class Relay:
    """The parts of a daemon that SSH needs: engine, service, SSH port. Its `settings` can be replaced."""

    settings: Settings
    credentials: tuple[Credential, ...] = ()
    exempt: bool = True  # loopback, from limits and penalties
    control: ControlSettings = field(default_factory=ControlSettings)
    service: TunnelService = field(init=False)
    preauth: PreauthLimiter = field(init=False)
    listener: ReloadableListener = field(init=False)
    port: int = 0
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)

    @property
    def tunnel(self) -> Tunnel:
        """The only open tunnel."""
        (tunnel,) = self.service.tunnels()
        return tunnel

    def change(self, **keys: Any) -> None:
        """Change keys of [ssh], as a reload does."""
        self.settings = self.settings.model_copy(update={"ssh": self.settings.ssh.model_copy(update=keys)})

    async def open(self, **options: str) -> Tunnel:
        """Do `openTunnel ssh`."""
        return await self.service.open_tunnel("ssh", TunnelOptions.parse({"persist": "yes", **options}), ME)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Poll a condition of the relay."""
        while not condition():
            await trio.lowlevel.checkpoint()

    async def until_served(self, count: int = 1) -> list[Tunnel]:
        """Wait until `count` tunnels have a connection of their hidden server; returns all tunnels."""
        await self.until(lambda: sum(bool(tunnel.parked) for tunnel in self.service.tunnels()) == count)
        return list(self.service.tunnels())


@asynccontextmanager
async def relay(
    credentials: Sequence[Credential] = (),
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    exempt: bool = True,
    tunnels: Any = None,
    **ssh: Any,
) -> AsyncIterator[Relay]:
    """A relay on loopback."""
    settings = Settings.model_validate({"tunnels": {"ports": "0", **(tunnels or {})}})
    here = Relay(settings.model_copy(update={"ssh": SshSettings(enabled=True, **ssh)}), tuple(credentials), exempt)
    here.preauth = PreauthLimiter(lambda: here.control, (lambda host: True) if exempt else (lambda host: False))
    authenticator = Authenticator(lambda: here.credentials, here.preauth)
    engine = new_engine()
    assert isinstance(engine, Pump)
    async with trio.open_nursery() as nursery:
        await nursery.start(engine.run)
        handshakes = HandshakeSupervisor(authenticator, lambda: None, lambda: PATIENCE)
        await nursery.start(handshakes.run)
        here.service = TunnelService(lambda: here.settings, engine, BACKENDS, KeyRegistry(), handshakes=handshakes)
        await nursery.start(here.service.run)
        here.listener = listener = ReloadableListener("ssh", sockets.bind_tcp(host, port))
        here.port = listener.port
        with here.scope:
            async with trio.open_nursery() as servers:
                ssh_settings = lambda: here.settings.ssh  # noqa: E731
                await servers.start(
                    serve_ssh,
                    listener,
                    ssh_settings,
                    HOST_KEY,
                    here.service,
                    executor(cast("DaemonControl", here)),  # the commands of sessions need its service only
                    handshakes,
                    engine,
                    authenticator,
                )
                yield here
                servers.cancel_scope.cancel()
        nursery.cancel_scope.cancel()


def side_of(tunnel: Tunnel) -> SshServerSide:
    """The server side of a tunnel."""
    side = tunnel.server_side
    assert isinstance(side, SshServerSide)
    return side


# Clients


class Client:
    """A running ssh client."""

    def __init__(self, process: trio.Process) -> None:
        self.process = process
        self.out = self.err = ""
        self._more = trio.Event()
        self._open_pipes = 2

    async def collect(self, stream: Any, name: str) -> None:
        """Collect the output of one pipe."""
        async for chunk in stream:
            setattr(self, name, getattr(self, name) + chunk.decode(errors="replace"))
            self._notify()
        self._open_pipes -= 1
        self._notify()

    def _notify(self) -> None:
        self._more.set()
        self._more = trio.Event()

    async def wait_output(self, pattern: str, where: str = "err") -> re.Match[str]:
        """Wait until its output matches."""
        with trio.fail_after(PATIENCE):
            while not (found := re.search(pattern, getattr(self, where))):
                more = self._more
                await more.wait()
            return found

    async def port(self) -> int:
        """The port that the client reports as allocated."""
        return int((await self.wait_output(r"[Aa]llocated port (\d+)"))[1])

    async def ended(self) -> int:
        """Wait until its output has ended; returns its exit status."""
        with trio.fail_after(PATIENCE):
            while self._open_pipes:
                await self._more.wait()
            return await self.process.wait()


@asynccontextmanager
async def client(command: Sequence[str | Path], **options: Any) -> AsyncIterator[Client]:
    """Run a client, which is killed at the end of the block."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    async with program([str(word) for word in command], **pipes) as process, trio.open_nursery() as nursery:
        running = Client(process)
        nursery.start_soon(running.collect, process.stdout, "out")
        nursery.start_soon(running.collect, process.stderr, "err")
        yield running
        nursery.cancel_scope.cancel()


def openssh(
    relay: Relay | int, *arguments: str | Path, key: Path | None = None, user: str = "user"
) -> list[str | Path]:
    """A command of OpenSSH's client for a relay or a port, without this user's configuration, agent and known hosts."""
    settings = {
        "BatchMode": "yes",
        "GlobalKnownHostsFile": os.devnull,
        "IdentitiesOnly": "yes",
        "IdentityAgent": "none",
        "LogLevel": "INFO",
        "StrictHostKeyChecking": "no",
        "UserKnownHostsFile": os.devnull,
    }
    options = [f"-o{name}={value}" for name, value in settings.items()]
    identity: list[str | Path] = ["-i", key] if key is not None else []
    port = str(relay if isinstance(relay, int) else relay.port)
    return [find_program("ssh"), "-F", "none", *options, *identity, "-p", port, "-l", user, *arguments]


def make_key(folder: Path, name: str = "id") -> tuple[Path, str]:
    """Generate a key pair; returns the private key's file and the public key as a line."""
    key = asyncssh.generate_private_key("ssh-ed25519", comment=name)
    path = folder / name
    path.write_bytes(key.export_private_key())
    path.chmod(0o600)
    line = key.export_public_key().decode().strip()
    path.with_suffix(".pub").write_text(line + "\n")
    return path, line


def public_address(port: int) -> Endpoint:
    """The public address with this port."""
    return Endpoint("tcp", "127.0.0.1", port)
