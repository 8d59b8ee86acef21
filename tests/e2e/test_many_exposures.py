"""`tunnel up` with many exposures beside a real relay: how many connections that takes, also after a kill."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import trio

from tests.agent.support import echo, local_server
from tests.agent.test_expose import ask
from tests.support.pki import Pki
from tests.support.programs import daemon, lasting_port, program, tunnel_command
from tunneld.net.endpoint import Endpoint

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="counts connections in /proc"),
    pytest.mark.timeout(120),
]

COUNT = 12


def connections(pid: int) -> int:
    """The established TCP connections of a process."""
    inodes = set[str]()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            inodes.add(str(descriptor.readlink()).removeprefix("socket:[").removesuffix("]"))
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(row[3] == "01" and row[9] in inodes for row in rows)


async def opened(agent: trio.Process, addresses: dict[str, Endpoint]) -> None:
    """Read the agent's events until all exposures have opened."""
    assert agent.stdout is not None
    left, buffered = COUNT, b""
    while left:
        buffered += await agent.stdout.receive_some()
        *lines, buffered = buffered.split(b"\n")
        for event in map(json.loads, lines):
            if event["event"] == "opened":
                left -= 1
                addresses[event["exposure"]] = Endpoint.parse(event["address"])


async def test_twelve_exposures_need_two_connections_and_so_they_do_after_a_kill_of_the_relay(
    tmp_path: Path,
) -> None:
    pki, control = Pki.issue(tmp_path / "pki"), lasting_port()
    async with local_server(echo) as target, daemon(tmp_path, pki=pki, control=control) as relay:
        file = tmp_path / "expose.toml"
        tables = "".join(f"[expose.e{number}]\ntarget = {target.port}\n" for number in range(COUNT))
        file.write_text(f'[relay]\nwhere = "tls://localhost:{control}"\npin = "{pki.pin}"\n{tables}')
        command = tunnel_command("up", "--file", str(file), "--json")
        addresses: dict[str, Endpoint] = {}
        async with program(command, stdout=subprocess.PIPE) as agent:
            await opened(agent, addresses)
            for address in addresses.values():
                assert await ask(address, b"hello") == b"hello"
            assert connections(agent.pid) == 2
            relay.process.kill()
            await relay.process.wait()
            async with daemon(tmp_path, pki=pki, control=control):
                await opened(agent, addresses)
                for address in addresses.values():
                    assert await ask(address, b"again") == b"again"
                assert connections(agent.pid) == 2
