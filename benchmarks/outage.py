"""`python -m benchmarks.outage`: what happens to a tunnel, and what visitors notice, over two machines of our own.

    relay 10.78.0.1 ── wire ── home 10.78.0.2        tunneld and visitors here, the agent and its server there

The relay is one that `tunneld init` wrote: TLS, a credential. The machines are network namespaces, so it wants root and
Linux. Three watch while something happens:

    a visitor who tries ten times a second     back after: from when the fault is over (the packets pass, the program
                                               was started) until one who came later has his answer
    `list`, five times a second                said ready: for how long the phase was ready while no visitor was served
    an upload that was there before            how it ended; acknowledged octets that are not at the server, which would
                                               be lies; octets sent and not acknowledged, which it knows to be in doubt
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.machines import Machine, connect, machines
from benchmarks.processes import BenchError, need, orphans_ended
from benchmarks.topologies import TUNNEL
from benchmarks.watcher import NAME, Seen
from benchmarks.witness import proven
from tunneld.pin import first_fingerprint

RELAY, HOME, ELSEWHERE = "10.78.0.1", "10.78.0.2", "10.78.0.3"
CONTROL, CARRIERS, PUBLIC, SERVER = 7010, 7012, 20080, 8000
START_WITHIN, RECOVER_WITHIN = 15.0, 60.0
"""Seconds after which we give up."""
REST = 2.0
"""Seconds before a fault and after it: the next one finds a tunnel at rest."""
AGAIN = 1.0
"""Seconds after which a service manager starts a daemon again that has failed (RestartSec)."""


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


# The faults: each begins, lasts, and is over when the function returns, or at the time that it returns

Fault = Callable[[World], float | None]


def silence(seconds: float) -> Fault:
    """All packets vanish, both ways."""

    def fault(world: World) -> None:
        world.nft(
            "add table inet cut",
            "add chain inet cut come { type filter hook input priority 0; policy accept; }",
            "add chain inet cut go { type filter hook output priority 0; policy accept; }",
            f"add rule inet cut come ip saddr {RELAY} drop",
            f"add rule inet cut go ip daddr {RELAY} drop",
        )
        time.sleep(seconds)
        world.nft("delete table inet cut")

    return fault


def reset(world: World) -> None:
    """Whatever is said to the carriers' port is answered by a reset, for a moment."""
    world.nft(
        "add table inet cut",
        "add chain inet cut go { type filter hook output priority 0; policy accept; }",
        f"add rule inet cut go tcp dport {CARRIERS} reject with tcp reset",
    )
    time.sleep(0.5)
    world.nft("delete table inet cut")


def roam(world: World) -> None:
    """The laptop is carried to another network: its address goes, another one comes a second later."""
    before, after = (HOME, ELSEWHERE) if _has(world.at_home, HOME) else (ELSEWHERE, HOME)
    world.at_home.must("ip", "address", "del", f"{before}/24", "dev", "w")
    time.sleep(1)
    world.at_home.must("ip", "address", "add", f"{after}/24", "dev", "w")


def _has(machine: Machine, address: str) -> bool:
    done = subprocess.run(machine.command(need("ip"), "address", "show"), capture_output=True, text=True, check=True)
    return f"{address}/" in done.stdout


def stop(name: str, seconds: float) -> Fault:
    """A program hangs (SIGSTOP), and goes on."""

    def fault(world: World) -> None:
        process: subprocess.Popen[bytes] = getattr(world, name)
        process.send_signal(signal.SIGSTOP)
        time.sleep(seconds)
        process.send_signal(signal.SIGCONT)

    return fault


def kill(name: str) -> Fault:
    """A program is killed (SIGKILL) and started again."""

    def fault(world: World) -> None:
        process: subprocess.Popen[bytes] = getattr(world, name)
        process.kill()
        process.wait()
        getattr(world, f"start_{name}")()

    return fault


def usurp(seconds: float) -> Fault:
    """The daemon is killed, and another program has its control port when it comes back. Over when that one is gone."""

    def fault(world: World) -> float:
        world.relay.kill()
        world.relay.wait()
        squat = f"import socket, time; s = socket.create_server(('', {CONTROL})); time.sleep({seconds})"
        with world.visitor("-c", squat) as other:
            wait(seconds, lambda: world.connects(CONTROL))
            gone = time.monotonic() + seconds
            while True:  # as a service manager does
                world.start_relay()
                try:
                    world.relay.wait(AGAIN + 2)
                except subprocess.TimeoutExpired:
                    other.wait(10)
                    return min(gone, time.monotonic())
                time.sleep(AGAIN)

    return fault


def faults(drops: list[float], stops: float) -> dict[str, Fault]:
    """All of them, by name."""
    return {
        **{f"packets dropped for {seconds:g} s": silence(seconds) for seconds in drops},
        "carrier reset": reset,
        "agent's address changes": roam,
        f"agent stopped for {stops:g} s": stop("agent", stops),
        f"daemon stopped for {stops:g} s": stop("relay", stops),
        "agent killed, started again": kill("agent"),
        "daemon killed, started again": kill("relay"),
        "daemon's port taken for 5 s": usurp(5),
        "local server killed, started again": kill("server"),
    }


@dataclass(frozen=True, slots=True)
class Row:
    """One fault, once."""

    back: float
    said_ready: float
    upload: Upload


def measure(world: World, fault: Fault) -> Row:
    """Let it happen. Raises `BenchError`."""
    with world.watched() as watch, world.upload() as upload:
        time.sleep(REST)
        over = fault(world) or time.monotonic()
        time.sleep(REST)
        wait(RECOVER_WITHIN, world.serves)
        time.sleep(REST)
        seen = watch()
        return Row(seen.back_after(over), seen.ready_though_away, upload())


def wait(seconds: float, for_what: Callable[[], bool]) -> None:
    """Wait until it is so. Raises `BenchError`."""
    until = time.monotonic() + seconds
    while not for_what():
        if time.monotonic() > until:
            raise BenchError(f"no visitor was served in {seconds:g} s")
        time.sleep(0.2)


def told(name: str, rows: list[Row]) -> str:
    """A line of the table."""
    back = " ".join(f"{row.back:.1f}" for row in rows)
    ends = ", ".join(sorted({row.upload.end for row in rows}))
    lost, doubt = max(row.upload.lost for row in rows), max(row.upload.in_doubt for row in rows)
    ready = max(row.said_ready for row in rows)
    middle = median(row.back for row in rows)
    return (
        f"{name:<36}{middle:>7.1f}  {ready:>11.1f}  {ends:<12}{lost:>12}{doubt:>10}   {back if len(rows) > 1 else ''}"
    )


HEAD = f"{'':<36}{'back, s':>7}  {'said ready, s':>11}  {'an upload':<10}{'acked, lost':>12}{'in doubt':>10}   octets"


def main() -> int:
    """Run it. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.outage", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--drop", type=float, action="append", metavar="SECONDS", help="5, 30 and 90 if not given")
    parser.add_argument("--stop", type=float, default=60.0, metavar="S", help="how long programs hang (%(default)g)")
    parser.add_argument("--rounds", type=int, default=1, metavar="N", help="how often each (%(default)s)")
    parser.add_argument("--backend", choices=("webmux", "tcp"), default="webmux", help="(%(default)s)")
    parser.add_argument("--only", action="append", metavar="WORDS", help="faults whose name has these words")
    options = parser.parse_args()
    every = faults(options.drop or [5.0, 30.0, 90.0], options.stop)
    chosen = {name: fault for name, fault in every.items() if any(word in name for word in options.only or [""])}
    rows: dict[str, list[Row]] = {}
    with ExitStack() as stack:
        stack.enter_context(orphans_ended())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="outage-")))
        world = World(folder, stack.enter_context(machines("relay", "home")), options.backend)
        stack.callback(world.end)
        try:
            world.begin()
            print(HEAD)
            for name, fault in chosen.items():
                print(f"{name} ...", file=sys.stderr, flush=True)
                rows[name] = [measure(world, fault) for _ in range(options.rounds)]
                print(told(name, rows[name]), flush=True)
        except BenchError:
            for log in folder.glob("*.log"):
                sys.stderr.write("".join(log.read_text().splitlines(keepends=True)[-40:]))
            raise
    print(f"median of all: {median(row.back for each in rows.values() for row in each):.1f} s")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BenchError as error:
        sys.exit(f"benchmarks: {error}")
