"""Two machines and the programs on them: a relay as `tunneld init` writes it, an agent that comes to it, a server.

relay 10.78.0.1 ── wire ── home 10.78.0.2        tunneld and visitors here, the agent and its server there

They are network namespaces, see machines.py.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.machines import Machine, connect
from benchmarks.processes import BenchError
from benchmarks.topologies import TUNNEL
from benchmarks.watcher import NAME, Seen
from benchmarks.witness import proven
from tunneld.tls.pins import first_fingerprint

RELAY, HOME = "10.78.0.1", "10.78.0.2"
CONTROL, CARRIERS, PUBLIC, SERVER = 7010, 7012, 20080, 8000
START_WITHIN = 15.0
"""Seconds after which we give up."""


class World:
    """Two machines and the programs on them."""

    relay: subprocess.Popen[bytes]
    agent: subprocess.Popen[bytes]
    server: subprocess.Popen[bytes]

    def __init__(self, folder: Path, machines: list[Machine], backend: str) -> None:
        self.folder, self.backend = folder, backend
        self.at_relay, self.at_home = machines
        self.uploads = 0
        connect(self.at_relay, RELAY, self.at_home, HOME)
        init = [sys.executable, "-m", "tunneld", "init", "--host", RELAY, "--output", str(folder / "relay")]
        printed = subprocess.run(init, capture_output=True, text=True, check=True).stdout
        secret, *self.words = shlex.split(printed)
        self.environment = os.environ | dict([secret.split("=", 1)])
        self.pin = first_fingerprint(folder / "relay" / "relay.pem")

    def begin(self) -> None:
        """Start everything and wait until a visitor is served. Raises `BenchError`."""
        self.start_server()
        self.start_relay()
        wait(START_WITHIN, lambda: self.connects(CONTROL))
        self.start_agent()
        wait(START_WITHIN, self.serves)

    def connects(self, port: int) -> bool:
        """Whether somebody listens at the relay."""
        return self._tries(f"import socket; socket.create_connection(('{RELAY}', {port}), 1)")

    def serves(self) -> bool:
        """Whether a visitor is served."""
        visit = f"import socket; s = socket.create_connection(('{RELAY}', {PUBLIC}), 1)"
        return self._tries(f"{visit}; s.settimeout(1); s.sendall(b'p'); exit(not s.recv(1))")

    def _tries(self, program: str) -> bool:
        command = self.at_relay.command(sys.executable, "-c", program)
        return subprocess.run(command, capture_output=True, timeout=20, check=False).returncode == 0

    def start_relay(self) -> None:
        """`tunneld`."""
        config = str(self.folder / "relay" / "tunnel.toml")
        self.relay = self._start(self.at_relay, "-m", "tunneld", "--config", config)

    def start_agent(self) -> None:
        """The line that `tunneld init` printed, with a name and a port."""
        words = [*self.words[1:], "--port", str(PUBLIC), "--name", NAME, "--backend", self.backend]
        words[words.index("8000")] = str(SERVER)
        self.agent = self._start(self.at_home, "-c", TUNNEL, *words)

    def start_server(self) -> None:
        """A server that only the agent reaches."""
        words = ("-m", "benchmarks.witness", "serve", str(SERVER), str(self.folder))
        self.server = self._start(self.at_home, *words)

    @contextmanager
    def watched(self) -> Iterator[Callable[[], Seen]]:
        """Somebody watches until what is yielded is called."""
        words = ("-m", "benchmarks.watcher", f"tls://{RELAY}:{CONTROL}", self.pin, RELAY, str(PUBLIC))
        with self.visitor(*words) as process:

            def end() -> Seen:
                process.terminate()
                return Seen(process.communicate(timeout=20)[0])

            yield end

    @contextmanager
    def upload(self) -> Iterator[Callable[[], Upload]]:
        """Somebody uploads until what is yielded is called. Raises `BenchError`."""
        self.uploads += 1
        name = f"upload{self.uploads}"
        words = ("-m", "benchmarks.witness", "upload", RELAY, str(PUBLIC), name)
        with self.visitor(*words) as process:
            assert process.stdout is not None
            if process.stdout.readline() != "uploads\n":
                raise BenchError("an upload could not begin")

            def end() -> Upload:
                process.terminate()
                figures = json.loads(process.communicate(timeout=20)[0])
                return Upload.of(figures, proven(self.folder / name))

            yield end

    def nft(self, *commands: str) -> None:
        """Packet filters at home."""
        for command in commands:
            self.at_home.must("nft", command)

    def end(self) -> None:
        """Nothing is left."""
        for process in (self.agent, self.relay, self.server):
            process.kill()
            process.wait()

    def _start(self, machine: Machine, *words: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{machine.name}.log").open("ab") as log:
            command = machine.command(sys.executable, *words)
            return subprocess.Popen(command, stdout=log, stderr=log, env=self.environment)

    @contextmanager
    def visitor(self, *words: str) -> Iterator[subprocess.Popen[str]]:
        command = self.at_relay.command(sys.executable, *words)
        process = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, env=self.environment)
        try:
            yield process
        finally:
            process.kill()
            process.communicate()


@dataclass(frozen=True, slots=True)
class Upload:
    """How an upload went, in octets."""

    end: str
    lost: int  # acknowledged, and not at the server
    in_doubt: int  # sent, and not acknowledged

    @classmethod
    def of(cls, figures: dict[str, int], arrived: int) -> Upload:
        """`arrived` as the server has it."""
        acknowledged, sent = figures["acknowledged"], figures["sent"]
        return cls(str(figures["end"]), max(acknowledged - arrived, 0), sent - acknowledged)


def wait(seconds: float, for_what: Callable[[], bool]) -> None:
    """Wait until it is so. Raises `BenchError`."""
    until = time.monotonic() + seconds
    while not for_what():
        if time.monotonic() > until:
            raise BenchError(f"no visitor was served in {seconds:g} s")
        time.sleep(0.2)
