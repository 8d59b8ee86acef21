"""Run on a machine of its own by test_surroundings.py: a relay whose peers vanish, and a bystander who stays."""

from __future__ import annotations

import sys
from contextlib import AsyncExitStack
from pathlib import Path

import trio

from tests.support.besieged import MIB, Siege, besieged
from tests.support.people import PATIENCE
from tunneld.net.endpoint import Endpoint

VANISHING = "127.0.0.2"
EACH = 40


async def main(folder: Path, nft: str) -> None:
    """Raises what does not hold."""
    async with besieged(folder) as siege, AsyncExitStack() as stack:
        await siege.set("tunnels", "keepalive = 1.0\npairing_timeout = 2.0")
        server, visitors = await siege.opened(server_from="any")
        before = siege.relay.descriptors
        for endpoint in (server, visitors, server):  # relays, and behind them parked ones
            for _ in range(EACH):
                stream = await trio.open_tcp_stream(endpoint.host, endpoint.port, local_address=VANISHING)
                stack.callback(stream.socket.close)
        with trio.fail_after(PATIENCE):
            while siege.relay.descriptors < before + 3 * EACH:
                await siege.check_answers()
        rule = f"ip saddr {VANISHING} drop; ip daddr {VANISHING} drop"
        script = "add table inet v; add chain inet v o { type filter hook output priority 0; };"
        script += "".join(f"add rule inet v o {one};" for one in rule.split("; "))
        await trio.run_process([nft, script])
        await siege.check_progress(8 * MIB)
        await gone(siege, server)
        await siege.check_progress(MIB)
        await siege.check_answers()


async def gone(siege: Siege, server: Endpoint) -> None:
    """Until the tunnel stands with nobody in it."""
    phase = ""
    with trio.fail_after(PATIENCE):
        while phase != "waiting":
            async with siege.operator() as operator:
                phase = (await operator.show(str(server)))[0]["phase"]


if __name__ == "__main__":
    trio.run(main, Path(sys.argv[1]), sys.argv[2])
