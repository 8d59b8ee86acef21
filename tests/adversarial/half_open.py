"""Run by test_surroundings.py in a network namespace: a relay with peers that vanish, and a bystander that stays."""

from __future__ import annotations

import sys
from contextlib import AsyncExitStack
from pathlib import Path

import trio

from tests.support.attacked_relay import MIB, AttackedRelay, attacked_relay
from tests.support.peers import PATIENCE
from tunneld.net.endpoint import Endpoint

VANISHING = "127.0.0.2"
EACH = 40


async def main(folder: Path, nft: str) -> None:
    """Run the test. Raises `AssertionError` if it fails."""
    async with attacked_relay(folder) as target, AsyncExitStack() as stack:
        await target.set("tunnels", "keepalive = 1.0\npairing_timeout = 2.0")
        server, visitors = await target.opened(server_from="any")
        before = target.relay.descriptors
        for endpoint in (server, visitors, server):  # relays, and behind them parked ones
            for _ in range(EACH):
                stream = await trio.open_tcp_stream(endpoint.host, endpoint.port, local_address=VANISHING)
                stack.callback(stream.socket.close)
        with trio.fail_after(PATIENCE):
            while target.relay.descriptors < before + 3 * EACH:
                await target.check_answers()
        rule = f"ip saddr {VANISHING} drop; ip daddr {VANISHING} drop"
        script = "add table inet v; add chain inet v o { type filter hook output priority 0; };"
        script += "".join(f"add rule inet v o {one};" for one in rule.split("; "))
        await trio.run_process([nft, script])
        await target.check_progress(8 * MIB)
        await gone(target, server)
        await target.check_progress(MIB)
        await target.check_answers()


async def gone(target: AttackedRelay, server: Endpoint) -> None:
    """Wait until the tunnel has no connections."""
    phase = ""
    with trio.fail_after(PATIENCE):
        while phase != "waiting":
            async with target.operator() as operator:
                phase = (await operator.show(str(server)))[0]["phase"]


if __name__ == "__main__":
    trio.run(main, Path(sys.argv[1]), sys.argv[2])
