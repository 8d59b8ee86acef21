"""The agent's machine changes its address, and the tunnel keeps its own."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from tests.e2e.test_three_machines import line_of, wait_ready
from tests.support.netns import Find, Namespace, internet
from tests.support.peers import PATIENCE
from tests.support.programs import program, tunnel_command
from tunneld.config import make_verifier
from tunneld.net.endpoint import Endpoint

RELAY, OLD, NEW = "10.79.0.1", "10.79.0.2", "10.79.0.3"
SECRET = "correct horse battery"
CONFIG = f"""
[control]
host = "{RELAY}"
open_to_anyone = true
[http]
enabled = false
[egtp]
enabled = true
[tunnels]
host = "{RELAY}"
[daemon]
state = "state"
"""
CREDENTIAL = """
[[credential]]
name = "agent"
verifier = "{verifier}"
"""
PORT = "8000"


async def served(visitor: Namespace, find: Find, address: Endpoint) -> None:
    """Visit repeatedly until the page arrives."""
    curl = [find("curl"), "-sS", "--fail", "--max-time", "2", f"http://{address.authority}/index.html"]
    while True:
        got = await trio.run_process(visitor.command(*curl), capture_stdout=True, capture_stderr=True, check=False)
        if got.stdout == b"here I am":
            return
        await trio.sleep(0.1)


@pytest.mark.parametrize("backend", ["webmux", "tcp", "egtp"])
@pytest.mark.parametrize("credential", ["agent", ""])
async def test_after_an_address_change_the_tunnel_serves_again(
    tmp_path: Path, program_path: Find, backend: str, credential: str
) -> None:
    (tmp_path / "index.html").write_text("here I am")
    words = CREDENTIAL.format(verifier=make_verifier(SECRET)) if credential else ""
    (tmp_path / "tunnel.toml").write_text(CONFIG + words)
    with internet(program_path) as net, trio.fail_after(3 * PATIENCE):
        relay, home = net.machine("relay"), net.machine("home")
        _, device = net.wire(relay, RELAY, home, OLD)
        serve = [sys.executable, "-m", "tunneld", "--config", str(tmp_path / "tunnel.toml"), "--log-format", "json"]
        web = [sys.executable, "-u", "-m", "http.server", PORT, "--directory", str(tmp_path)]
        known = ["--credential", credential] if credential else []
        expose = tunnel_command(
            "expose", PORT, "--relay", f"{RELAY}:7010", "--backend", backend, "--name", "web", "--quiet", *known
        )
        environment = os.environ | ({"TUNNEL_SECRET": SECRET} if credential else {})
        async with (
            program(relay.command(*serve), stderr=subprocess.PIPE) as daemon,
            program(home.command(*web), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as server,
        ):
            await wait_ready(daemon)
            await line_of(server.stdout)
            quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "env": environment}
            async with program(home.command(*expose), **quiet) as agent:
                address = Endpoint.parse((await line_of(agent.stdout)).decode().strip())
                await served(relay, program_path, address)
                home.must("ip", "address", "delete", f"{OLD}/24", "dev", device)
                home.must("ip", "address", "add", f"{NEW}/24", "dev", device)
                await served(relay, program_path, address)


async def test_a_download_over_egtp_survives_an_address_change(tmp_path: Path, program_path: Find) -> None:
    """As the example in tunnel(1) says: a pause is all that the visitor notices."""
    (tmp_path / "film").write_bytes(random.Random(1).randbytes(16 << 20))
    (tmp_path / "tunnel.toml").write_text(CONFIG)
    with internet(program_path) as net, trio.fail_after(3 * PATIENCE):
        relay, home = net.machine("relay"), net.machine("home")
        _, device = net.wire(relay, RELAY, home, OLD)
        serve = [sys.executable, "-m", "tunneld", "--config", str(tmp_path / "tunnel.toml"), "--log-format", "json"]
        web = [sys.executable, "-u", "-m", "http.server", PORT, "--directory", str(tmp_path)]
        expose = tunnel_command("expose", PORT, "--relay", f"{RELAY}:7010", "--backend", "egtp", "--quiet")
        async with (
            program(relay.command(*serve), stderr=subprocess.PIPE) as daemon,
            program(home.command(*web), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as server,
        ):
            await wait_ready(daemon)
            await line_of(server.stdout)
            quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            async with program(home.command(*expose), **quiet) as agent:
                address = Endpoint.parse((await line_of(agent.stdout)).decode().strip())
                curl = [
                    program_path("curl"),
                    "-sS",
                    "--fail",
                    "--limit-rate",
                    "24M",
                    f"http://{address.authority}/film",
                ]
                async with program(relay.command(*curl), stdout=subprocess.PIPE) as reader:
                    assert reader.stdout is not None
                    received = await reader.stdout.receive_some(1 << 20)
                    home.must("ip", "address", "delete", f"{OLD}/24", "dev", device)
                    home.must("ip", "address", "add", f"{NEW}/24", "dev", device)
                    while chunk := await reader.stdout.receive_some(1 << 20):
                        received += chunk
                    assert await reader.wait() == 0
    assert received == (tmp_path / "film").read_bytes()
