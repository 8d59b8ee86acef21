"""Faults for `benchmarks.outage`. Each is a function that causes a fault and waits for its end. It returns the time at
which the fault was over; None means now.
"""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable

from benchmarks.machines import Machine
from benchmarks.processes import need
from benchmarks.world import CARRIERS, CONTROL, HOME, RELAY, World, wait

ELSEWHERE = "10.78.0.3"
AGAIN = 1.0
"""Seconds after which a service manager restarts a daemon that has failed (RestartSec=)."""

Fault = Callable[[World], float | None]


def silence(seconds: float) -> Fault:
    """Drop all packets in both directions."""

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
    """Answer all packets to the carriers' port with a reset, for half a second."""
    world.nft(
        "add table inet cut",
        "add chain inet cut go { type filter hook output priority 0; policy accept; }",
        f"add rule inet cut go tcp dport {CARRIERS} reject with tcp reset",
    )
    time.sleep(0.5)
    world.nft("delete table inet cut")


def roam(world: World) -> None:
    """Move the agent to another network: its address is removed, and another one is added a second later."""
    before, after = (HOME, ELSEWHERE) if _has(world.at_home, HOME) else (ELSEWHERE, HOME)
    world.at_home.must("ip", "address", "del", f"{before}/24", "dev", "w")
    time.sleep(1)
    world.at_home.must("ip", "address", "add", f"{after}/24", "dev", "w")


def _has(machine: Machine, address: str) -> bool:
    done = subprocess.run(machine.command(need("ip"), "address", "show"), capture_output=True, text=True, check=True)
    return f"{address}/" in done.stdout


def stop(name: str, seconds: float) -> Fault:
    """Suspend a program (SIGSTOP) and continue it."""

    def fault(world: World) -> None:
        process: subprocess.Popen[bytes] = getattr(world, name)
        process.send_signal(signal.SIGSTOP)
        time.sleep(seconds)
        process.send_signal(signal.SIGCONT)

    return fault


def kill(name: str) -> Fault:
    """Kill a program (SIGKILL) and start it again."""

    def fault(world: World) -> None:
        process: subprocess.Popen[bytes] = getattr(world, name)
        process.kill()
        process.wait()
        getattr(world, f"start_{name}")()

    return fault


def usurp(seconds: float) -> Fault:
    """Kill the daemon, and let another program use its control port for some time."""

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
    """Return all faults by name."""
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
