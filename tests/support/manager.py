"""A service manager for tests, which passes sockets, stores descriptors and restarts the daemon.

It implements what sd_notify(3) and sd_listen_fds(3) describe: NOTIFY_SOCKET with FDSTORE, FDSTOREREMOVE and
BARRIER, and LISTEN_FDS with names.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from tests.support.peers import PATIENCE
from tests.support.programs import CONFIG, Daemon, program

LAUNCHER = """
import fcntl, os, sys
count = int(sys.argv[1])
given = [int(number) for number in sys.argv[2 : 2 + count]]
high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 3 + count) for fd in given]  # out of the way of their places
for place, fd in enumerate(high, 3):
    os.dup2(fd, place)
os.closerange(3 + count, max([*high, *given, 3 + count]) + 1)
if count:
    os.environ["LISTEN_PID"], os.environ["LISTEN_FDS"] = str(os.getpid()), str(count)
os.execv(sys.argv[2 + count], sys.argv[2 + count :])
"""


class Manager:
    """A service, and the descriptors stored for it."""

    def __init__(self, folder: Path) -> None:
        self.messages: list[str] = []
        self.stored: list[tuple[str, int]] = []
        self.sockets: list[tuple[str, socket.socket]] = []  # as from socket units
        self.unresponsive = False  # stores no descriptors and answers no barrier
        self._received = trio.Condition()
        self._config = folder / "tunnel.toml"
        self._path = str(folder / "notify")
        self._socket = trio.socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)

    async def listen(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Receive the messages of the service."""
        with self._socket:
            await self._socket.bind(self._path)
            task_status.started()
            while True:
                data, ancillary, _flags, _address = await self._socket.recvmsg(8192, socket.CMSG_SPACE(4 * 253))
                fds = [
                    int.from_bytes(payload[start : start + 4], sys.byteorder)
                    for _level, _kind, payload in ancillary
                    for start in range(0, len(payload), 4)
                ]
                self._receive(data.decode(), fds)
                async with self._received:
                    self._received.notify_all()

    async def wait_status(self, pattern: str) -> str:
        """Wait until the status matches the pattern, and return it."""
        with trio.fail_after(PATIENCE):
            while not re.fullmatch(pattern, self.status):
                async with self._received:
                    await self._received.wait()
        return self.status

    @property
    def status(self) -> str:
        """The status line that `systemctl status` would show."""
        lines = [line for message in self.messages for line in message.split("\n") if line.startswith("STATUS=")]
        return lines[-1].removeprefix("STATUS=") if lines else ""

    def _receive(self, message: str, fds: list[int]) -> None:
        fields = dict(line.split("=", 1) for line in message.split("\n"))
        self.messages.append(message)
        if fields.get("FDSTORE") == "1" and not self.unresponsive:
            self.stored += [(fields["FDNAME"], fd) for fd in fds]
            return
        if fields.get("FDSTOREREMOVE") == "1":
            for name, fd in self.stored:
                if name == fields["FDNAME"]:
                    os.close(fd)
            self.stored = [(name, fd) for name, fd in self.stored if name != fields["FDNAME"]]
        for fd in fds:  # closing the descriptor of a barrier answers it
            os.close(fd)

    def command(self) -> tuple[list[str], dict[str, str], list[int]]:
        """Return how to start the service: the command, the environment, the descriptors to pass."""
        given = [*((name, one.fileno()) for name, one in self.sockets), *self.stored]
        words = [sys.executable, "-m", "tunneld", "--config", str(self._config), "--log-format", "json"]
        launcher = [sys.executable, "-c", LAUNCHER, str(len(given)), *(str(fd) for _name, fd in given), *words]
        names = ":".join(name for name, _fd in given)
        return launcher, {**os.environ, "NOTIFY_SOCKET": self._path, "LISTEN_FDNAMES": names}, [fd for _, fd in given]

    @asynccontextmanager
    async def service(self) -> AsyncIterator[Daemon]:
        """Start the daemon with the sockets and the stored descriptors; it is ready when the block begins."""
        words, variables, fds = self.command()
        async with (
            program(words, stderr=subprocess.PIPE, env=variables, pass_fds=fds) as process,
            trio.open_nursery() as nursery,
        ):
            daemon = Daemon(process)
            nursery.start_soon(daemon.listen)
            await daemon.wait_logged("ready")
            daemon.control = (await daemon.wait_logged("control listens"))["uri"]
            yield daemon
            nursery.cancel_scope.cancel()

    async def failed_start(self) -> tuple[int, str]:
        """Start a daemon that fails; returns its exit status and standard error."""
        words, variables, fds = self.command()
        with trio.fail_after(PATIENCE):
            done = await trio.run_process(
                words, capture_stdout=True, capture_stderr=True, env=variables, pass_fds=fds, check=False
            )
        return done.returncode, done.stderr.decode()

    async def stop_for_restart(self, daemon: Daemon) -> int:
        """Stop the daemon as `systemctl restart` does, with the unit's RestartKillSignal=; returns the exit status."""
        daemon.process.send_signal(signal.SIGUSR1)
        with trio.fail_after(PATIENCE):
            return await daemon.process.wait()

    def write(self, control: int = 0) -> None:
        """Write the configuration; `control` is the control port, which a socket unit overrides."""
        self._config.write_text(CONFIG.format(drain_timeout=20.0, control=control, ports="0", daemon_lines=""))

    def forget(self) -> None:
        """Close all descriptors."""
        for fd in [*(fd for _name, fd in self.stored), *(one.detach() for _name, one in self.sockets)]:
            os.close(fd)
        self.stored, self.sockets = [], []


@asynccontextmanager
async def manager(folder: Path, sockets: Sequence[tuple[str, socket.socket]] = ()) -> AsyncIterator[Manager]:
    """Run a manager for the length of the block."""
    async with trio.open_nursery() as nursery:
        made = Manager(folder)
        made.sockets = list(sockets)
        made.write()
        await nursery.start(made.listen)
        try:
            yield made
        finally:
            made.forget()
        nursery.cancel_scope.cancel()
