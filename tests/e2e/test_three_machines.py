"""The README's two commands on two machines, the second behind a NAT, and a visitor on a third."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from tests.support.netns import Find, Namespace, internet
from tests.support.peers import PATIENCE
from tests.support.programs import program, tunnel_command
from tunneld.net.endpoint import Endpoint

RELAY, VISITOR = "10.77.0.1", "10.77.2.2"
PORT = "8000"
DAEMON = [sys.executable, "-m", "tunneld"]


async def line_of(stream: trio.abc.ReceiveStream | None) -> bytes:
    """Read one line byte by byte, and leave the rest in the stream."""
    assert stream is not None
    line = b""
    with trio.fail_after(PATIENCE):
        while not line.endswith(b"\n") and (octet := await stream.receive_some(1)):
            line += octet
    return line


async def wait_ready(relay: trio.Process) -> None:
    """Read the log of a relay until it is ready."""
    while json.loads(await line_of(relay.stderr))["event"] != "ready":
        pass


@pytest.mark.parametrize("backend", ["webmux", "tcp"])
async def test_a_server_behind_a_nat_is_reachable_from_another_network(
    tmp_path: Path, program_path: Find, backend: str
) -> None:
    with internet(program_path) as net:
        relay, nat, hidden, visitor = (net.machine(word) for word in ("relay", "nat", "hidden", "visitor"))
        net.wire(relay, RELAY, nat, "10.77.0.2")
        net.wire(nat, "10.77.1.1", hidden, "10.77.1.2")
        net.wire(relay, "10.77.2.1", visitor, VISITOR)
        for machine, gateway in ((hidden, "10.77.1.1"), (visitor, "10.77.2.1")):
            machine.must("ip", "route", "add", "default", "via", gateway)
        nat.masquerade()
        await meet(tmp_path, program_path, relay, hidden, visitor, backend)


async def meet(folder: Path, find: Find, relay: Namespace, hidden: Namespace, visitor: Namespace, backend: str) -> None:
    """Run `tunneld init`, the relay, the printed command, and curl, within a minute."""
    (folder / "index.html").write_text("from behind the NAT")
    init = [*DAEMON, "init", "--host", RELAY, "--output", str(folder / "relay")]
    with trio.fail_after(60):
        printed = (await trio.run_process(init, capture_stdout=True, capture_stderr=True)).stdout.decode()
        secret, *words = shlex.split(printed)
        environment = os.environ | dict([secret.split("=", 1)])
        config = str(folder / "relay" / "tunnel.toml")
        serve = [*DAEMON, "--config", config, "--log-format", "json"]
        web = [sys.executable, "-u", "-m", "http.server", PORT, "--directory", str(folder)]
        expose = tunnel_command(*words[1:], "--backend", backend)
        async with (
            program(relay.command(*serve), stderr=subprocess.PIPE) as daemon,
            program(hidden.command(*web), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as server,
        ):
            await wait_ready(daemon)
            await line_of(server.stdout)
            quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "env": environment}
            async with program(hidden.command(*expose), **quiet) as agent:
                address = Endpoint.parse((await line_of(agent.stdout)).decode().strip())
                assert address.host == RELAY
                curl = [find("curl"), "-sS", "--fail", "--max-time", "20", f"http://{address.authority}/index.html"]
                got = await trio.run_process(visitor.command(*curl), capture_stdout=True)
                assert got.stdout == b"from behind the NAT"
