"""`python -m benchmarks.outage`: how long a tunnel is away after what happens to it, over two machines of our own.

    relay 10.78.0.1 ── wire ── home 10.78.0.2        tunneld and the visitor here, the agent and its server there

The machines are network namespaces, so it wants root and Linux. The clock starts when the fault is over (the packets
pass again, the killed program was started again) and stops when a new visitor has its answer. Visitors try ten times a
second, and have half a second each: what a person sees who presses reload.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.processes import BenchError, need

RELAY, HOME = "10.78.0.1", "10.78.0.2"
CONTROL, CARRIERS, PUBLIC, SERVER = 7010, 7012, 20080, 8000
START_WITHIN, RECOVER_WITHIN = 15.0, 60.0
"""Seconds after which we give up."""
CONFIG = f"""
[control]
host = "{RELAY}"
open_to_anyone = true
[http]
enabled = false
[tunnels]
host = "{RELAY}"
ports = "{PUBLIC}-{PUBLIC + 9}"
[webmux]
port = {CARRIERS}
[daemon]
state = "state"
"""
ASK = f"""
import socket, time
while True:
    try:
        with socket.create_connection(("{RELAY}", {PUBLIC}), timeout=0.5) as visitor:
            visitor.sendall(b"GET / HTTP/1.0\\r\\n\\r\\n")
            if visitor.recv(4) == b"HTTP":
                break
    except OSError:
        pass
    time.sleep(0.1)
"""
"""What a visitor does until it is served."""


@dataclass
class World:
    """Two machines and the programs on them."""

    folder: Path
    prefix: str
    relay: subprocess.Popen[bytes]
    agent: subprocess.Popen[bytes]
    server: subprocess.Popen[bytes]

    @classmethod
    def begin(cls, folder: Path, prefix: str) -> World:
        """Start everything and wait until a visitor is served."""
        (folder / "tunnel.toml").write_text(CONFIG)
        (folder / "index.html").write_text("hello")
        world = cls.__new__(cls)
        world.folder, world.prefix = folder, prefix
        world.start_server()
        world.start_relay()
        time.sleep(1)
        world.start_agent()
        world.ask(START_WITHIN)
        return world

    def start_relay(self) -> None:
        """`tunneld`."""
        self.relay = self._start("relay", "-m", "tunneld", "--config", str(self.folder / "tunnel.toml"))

    def start_agent(self) -> None:
        """`tunnel expose`, as it comes."""
        words = ("expose", str(SERVER), "--relay", f"{RELAY}:{CONTROL}", "--port", str(PUBLIC), "--name", "web")
        self.agent = self._start("home", "-c", "from tunneld.cli.tunnel import main; main()", *words)

    def start_server(self) -> None:
        """A web server that only the agent reaches."""
        words = ("-m", "http.server", str(SERVER), "--bind", "127.0.0.1", "--directory", str(self.folder))
        self.server = self._start("home", *words)

    def ask(self, within: float) -> float:
        """Seconds until a visitor is served. Raises `BenchError`."""
        began = time.monotonic()
        command = [*self._on("relay"), sys.executable, "-c", ASK]
        try:
            subprocess.run(command, timeout=within, check=True, stdout=subprocess.DEVNULL)
        except subprocess.TimeoutExpired:
            raise BenchError(f"no visitor was served in {within:g} s") from None
        return time.monotonic() - began

    def nft(self, *commands: str) -> None:
        """Packet filters at home."""
        for command in commands:
            _run(*self._on("home"), need("nft"), command)

    def end(self) -> None:
        """Nothing is left."""
        for process in (self.agent, self.relay, self.server):
            process.kill()
            process.wait()

    def _start(self, machine: str, *words: str) -> subprocess.Popen[bytes]:
        log = (self.folder / f"{machine}.log").open("ab")
        with log:
            return subprocess.Popen([*self._on(machine), sys.executable, *words], stdout=log, stderr=log)

    def _on(self, machine: str) -> list[str]:
        return [need("ip"), "netns", "exec", f"{self.prefix}-{machine}"]


# The faults: each begins, lasts, and is over when the function returns


def silence(seconds: float) -> Callable[[World], None]:
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
    with _visitor(world):
        time.sleep(0.5)
    world.nft("delete table inet cut")


def stop(name: str, seconds: float) -> Callable[[World], None]:
    """A program hangs (SIGSTOP), and goes on."""

    def fault(world: World) -> None:
        process: subprocess.Popen[bytes] = getattr(world, name)
        process.send_signal(signal.SIGSTOP)
        time.sleep(seconds)
        process.send_signal(signal.SIGCONT)

    return fault


def kill(name: str) -> Callable[[World], None]:
    """A program is killed (SIGKILL) and started again."""

    def fault(world: World) -> None:
        process: subprocess.Popen[bytes] = getattr(world, name)
        process.kill()
        process.wait()
        getattr(world, f"start_{name}")()

    return fault


@contextmanager
def _visitor(world: World) -> Iterator[None]:
    """Somebody who wants something, so that there is something to answer."""
    command = [*world._on("relay"), sys.executable, "-c", ASK]
    process = subprocess.Popen(command)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def faults(drops: list[float], stops: float) -> dict[str, Callable[[World], None]]:
    """All of them, by name."""
    return {
        **{f"packets dropped for {seconds:g} s": silence(seconds) for seconds in drops},
        "carrier reset": reset,
        f"agent stopped for {stops:g} s": stop("agent", stops),
        f"daemon stopped for {stops:g} s": stop("relay", stops),
        "kill -9 agent, started again": kill("agent"),
        "kill -9 daemon, started again": kill("relay"),
        "local server killed, started again": kill("server"),
    }


def main() -> int:
    """Run it. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.outage", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--drop", type=float, action="append", metavar="SECONDS", help="5, 30 and 90 if not given")
    parser.add_argument(
        "--stop", type=float, default=60.0, metavar="SECONDS", help="how long programs hang (%(default)g)"
    )
    parser.add_argument("--rounds", type=int, default=1, metavar="N", help="how often each (%(default)s)")
    options = parser.parse_args()
    every = faults(options.drop or [5.0, 30.0, 90.0], options.stop)
    with machines() as (folder, prefix):
        world = World.begin(folder, prefix)
        try:
            for name, fault in every.items():
                times = [_measure(world, name, fault) for _ in range(options.rounds)]
                print(f"{name:<36} {'  '.join(f'{seconds:5.1f} s' for seconds in times)}", flush=True)
        except BenchError:
            sys.stderr.write((folder / "home.log").read_text() + (folder / "relay.log").read_text())
            raise
        finally:
            world.end()
    return 0


def _measure(world: World, name: str, fault: Callable[[World], None]) -> float:
    print(f"{name} ...", file=sys.stderr, flush=True)
    fault(world)
    seconds = world.ask(RECOVER_WITHIN)
    time.sleep(3)  # the next one finds a tunnel at rest
    return seconds


@contextmanager
def machines() -> Iterator[tuple[Path, str]]:
    """Two namespaces and a wire, gone when the block ends."""
    ip, prefix = need("ip"), f"outage{os.getpid()}"
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="outage-")))
        for machine in ("relay", "home"):
            _run(ip, "netns", "add", f"{prefix}-{machine}")
            stack.callback(_run, ip, "netns", "delete", f"{prefix}-{machine}")
            _run(ip, "-n", f"{prefix}-{machine}", "link", "set", "lo", "up")
        peer = ("peer", "name", "w", "netns", f"{prefix}-home")
        _run(ip, "-n", f"{prefix}-relay", "link", "add", "w", "type", "veth", *peer)
        for machine, address in (("relay", RELAY), ("home", HOME)):
            _run(ip, "-n", f"{prefix}-{machine}", "address", "add", f"{address}/24", "dev", "w")
            _run(ip, "-n", f"{prefix}-{machine}", "link", "set", "w", "up")
        yield folder, prefix


def _run(*command: str) -> None:
    """Raises `BenchError`."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    if done.returncode:
        raise BenchError(f"this machine cannot `{' '.join(command)}`: {done.stderr.strip()}")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BenchError as error:
        sys.exit(f"benchmarks: {error}")
