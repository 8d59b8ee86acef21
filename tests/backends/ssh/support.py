"""A relay with an SSH port inside the test, and real ssh clients beside it."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncssh
import trio

from tests.support.people import PATIENCE
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

ME = Requester(host="127.0.0.1", owner="127.0.0.1:9", local_host="127.0.0.1")
HOST_KEY = asyncssh.generate_private_key("ssh-ed25519")


@dataclass
class Relay:
    """The daemon without its process: engine, service, SSH port. What is in `settings` can be exchanged."""

    settings: Settings
    credentials: tuple[Credential, ...] = ()
    exempt: bool = True  # loopback, of caps and penalties
    control: ControlSettings = field(default_factory=ControlSettings)
    service: TunnelService = field(init=False)
    strangers: PreauthLimiter = field(init=False)
    port: int = 0
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)

    @property
    def tunnel(self) -> Tunnel:
        """The only one."""
        (tunnel,) = self.service.tunnels()
        return tunnel

    def change(self, **keys: Any) -> None:
        """As a reload does with keys of [ssh]."""
        self.settings = self.settings.model_copy(update={"ssh": self.settings.ssh.model_copy(update=keys)})

    async def open(self, **words: str) -> Tunnel:
        """OpenTunnel ssh."""
        return await self.service.open_tunnel("ssh", TunnelOptions.parse({"persist": "yes", **words}), ME)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something inside."""
        while not condition():
            await trio.lowlevel.checkpoint()

    async def until_served(self, count: int = 1) -> list[Tunnel]:
        """Wait until so many tunnels have their hidden server."""
        await self.until(lambda: sum(bool(tunnel.parked) for tunnel in self.service.tunnels()) == count)
        return list(self.service.tunnels())


@asynccontextmanager
async def relay(
    credentials: Sequence[Credential] = (), *, port: int = 0, exempt: bool = True, tunnels: Any = None, **ssh: Any
) -> AsyncIterator[Relay]:
    """A relay on loopback."""
    settings = Settings.model_validate({"tunnels": {"ports": "0", **(tunnels or {})}})
    here = Relay(settings.model_copy(update={"ssh": SshSettings(enabled=True, **ssh)}), tuple(credentials), exempt)
    here.strangers = PreauthLimiter(lambda: here.control, (lambda host: True) if exempt else (lambda host: False))
    gate = Authenticator(lambda: here.credentials, here.strangers)
    engine = new_engine()
    assert isinstance(engine, Pump)
    async with trio.open_nursery() as nursery:
        await nursery.start(engine.run)
        lobby = HandshakeSupervisor(gate, lambda: None, lambda: PATIENCE)
        await nursery.start(lobby.run)
        here.service = TunnelService(lambda: here.settings, engine, BACKENDS, KeyRegistry(), handshakes=lobby)
        await nursery.start(here.service.run)
        door = ReloadableListener("ssh", sockets.bind_tcp("127.0.0.1", port))
        here.port = door.port
        with here.scope:
            async with trio.open_nursery() as face:
                ssh_settings = lambda: here.settings.ssh  # noqa: E731
                await face.start(serve_ssh, door, ssh_settings, HOST_KEY, here.service, lobby, engine, gate)
                yield here
                face.cancel_scope.cancel()
        nursery.cancel_scope.cancel()


def side_of(tunnel: Tunnel) -> SshServerSide:
    """Its server side."""
    side = tunnel.server_side
    assert isinstance(side, SshServerSide)
    return side


# Clients


class Client:
    """A running ssh of somebody else."""

    def __init__(self, process: trio.Process) -> None:
        self.process = process
        self.out = self.err = ""
        self._more = trio.Event()
        self._speaking = 2  # of its two pipes

    async def listen(self, stream: Any, name: str) -> None:
        """Collect what it says."""
        async for chunk in stream:
            setattr(self, name, getattr(self, name) + chunk.decode(errors="replace"))
            self._tell()
        self._speaking -= 1
        self._tell()

    def _tell(self) -> None:
        self._more.set()
        self._more = trio.Event()

    async def wait_said(self, pattern: str, where: str = "err") -> re.Match[str]:
        """Wait for it to say something."""
        with trio.fail_after(PATIENCE):
            while not (found := re.search(pattern, getattr(self, where))):
                more = self._more
                await more.wait()
            return found

    async def port(self) -> int:
        """The port that it says was allocated."""
        return int((await self.wait_said(r"[Aa]llocated port (\d+)"))[1])

    async def ended(self) -> int:
        """Wait until it has said everything; its exit status."""
        with trio.fail_after(PATIENCE):
            while self._speaking:
                await self._more.wait()
            return await self.process.wait()


@asynccontextmanager
async def client(command: Sequence[str | Path], **options: Any) -> AsyncIterator[Client]:
    """Run one; killed at the end."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    async with program([str(word) for word in command], **pipes) as process, trio.open_nursery() as nursery:
        running = Client(process)
        nursery.start_soon(running.listen, process.stdout, "out")
        nursery.start_soon(running.listen, process.stderr, "err")
        yield running
        nursery.cancel_scope.cancel()


def openssh(
    relay: Relay | int, *words: str | Path, key: Path | None = None, user: str = "somebody"
) -> list[str | Path]:
    """OpenSSH's client, to a relay or a port, with nothing from this person's configuration, agent or known hosts."""
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
    return [find_program("ssh"), "-F", "none", *options, *identity, "-p", port, "-l", user, *words[:-1], words[-1]]


def make_key(folder: Path, name: str = "id") -> tuple[Path, str]:
    """A private key's file, and the public one as a line."""
    key = asyncssh.generate_private_key("ssh-ed25519", comment=name)
    path = folder / name
    path.write_bytes(key.export_private_key())
    path.chmod(0o600)
    line = key.export_public_key().decode().strip()
    path.with_suffix(".pub").write_text(line + "\n")
    return path, line


def visitors_of(port: int) -> Endpoint:
    """Where visitors connect."""
    return Endpoint("tcp", "127.0.0.1", port)
