"""What attacks cost a relay: `python -m benchmarks.siege` from the checkout, about a minute, one table.

Everything runs on loopback: the relay with its default limits, a bystander whose tunnel is busy all the time, and the
attackers in this process, whose own work takes from the bystander's speed.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import trio

from tests.support.attackers import crowd, flood, pour
from tests.support.besieged import KIB, MIB, Siege, besieged
from tests.support.people import go_home

LIMIT = 60.0
"""Seconds for one attack, beside the start of the relay."""

WATCHING = 2.0
"""Seconds for which a crowd stays."""

LOOK = 0.1
"""Seconds between two looks."""

AT_ONCE = 200
"""Visitors, and then as many servers for them: fewer than `max_waiting`."""


@dataclass
class Cost:
    """One row: what was seen at the worst moment."""

    resident: int = 0
    descriptors: int = 0
    latency: float = 0.0

    async def look(self, siege: Siege) -> None:
        """Ask for the list, and keep what is worse than before."""
        self.latency = max(self.latency, await siege.check_answers())
        self.resident = max(self.resident, siege.resident)
        self.descriptors = max(self.descriptors, siege.relay.descriptors)


async def nobody(_siege: Siege, _scale: int) -> None:
    """For comparison."""
    await trio.sleep(WATCHING)


async def never_readers(siege: Siege, scale: int) -> None:
    """Visitors who never read what a hidden server sends them: two descriptors each, in the relay and in us."""
    room = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2 - 500
    async with siege.ports() as ports, AsyncExitStack() as stack:
        for _ in range(min(10_000 // scale, room) // AT_ONCE):
            await stack.enter_async_context(crowd(ports["client"], AT_ONCE))
            await stack.enter_async_context(crowd(ports["server"], AT_ONCE, bytes(64 * KIB)))
        await trio.sleep(WATCHING)


async def short_connections(siege: Siege, scale: int) -> None:
    """They come to the control port and leave."""
    await flood(siege.control, 100_000 // scale)


async def slow_loris(siege: Siege, _scale: int) -> None:
    """As many as fit on the control port, with room for the operator."""
    async with crowd(siege.control, 250, b"lis"):
        await trio.sleep(WATCHING)


async def endless_line(siege: Siege, _scale: int) -> None:
    """A request that never ends."""
    await pour(siege.control, b"", b"a" * 64 * KIB, 1024 * MIB)


ATTACKS = [nobody, never_readers, short_connections, slow_loris, endless_line]


async def measure(attack: Callable[[Siege, int], Awaitable[None]], scale: int) -> str:
    """One attack on a relay of its own: its row."""
    cost = Cost()
    with tempfile.TemporaryDirectory() as folder:
        async with besieged(Path(folder)) as siege:
            before, resident, began = siege.progress, siege.resident, trio.current_time()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(keep_looking, siege, cost)
                with trio.move_on_after(LIMIT) as limit:
                    await attack(siege, scale)
                nursery.cancel_scope.cancel()
            took = trio.current_time() - began
            speed = (siege.progress - before) / took / MIB
    go_home()
    late = " (cut)" if limit.cancelled_caught else ""
    grown = (cost.resident - resident) / MIB
    name = attack.__name__.replace("_", " ")
    return f"{name:18}{took:8.1f}{grown:10.1f}{cost.descriptors:12}{cost.latency * 1000:10.0f}{speed:12.0f}{late}"


async def keep_looking(siege: Siege, cost: Cost) -> None:
    """Look again and again."""
    while True:
        await cost.look(siege)
        await trio.sleep(LOOK)


def main() -> int:
    """Print the table, a row when it is known."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.siege", description="what attacks cost a relay")
    parser.add_argument("--quick", action="store_true", help="a tenth of the attackers")
    scale = 10 if parser.parse_args().quick else 1
    print(f"{'':18}{'s':>8}{'RSS +MiB':>10}{'descriptors':>12}{'list, ms':>10}{'by, MiB/s':>12}")
    for attack in ATTACKS:
        print(f"... {attack.__name__}", file=sys.stderr)
        print(trio.run(measure, attack, scale), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
