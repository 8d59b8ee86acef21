"""Two devices behind one NAT: the wrong secret of one does not lock out the other; an operator can lift the block."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import subprocess
from pathlib import Path

import trio

from tests.e2e.test_three_machines import DAEMON, RELAY, wait_ready
from tests.support.netns import Find, Namespace, internet
from tests.support.programs import program, tunnel_command

NAT = "10.77.0.2"
SLOW_MACHINE = 300.0
"""Seconds for a dozen starts of Python, which are some seconds each under load."""
PENALTY = "[control]\npenalty = 600.0"
"""Seconds: no penalty expires during the test, however slow the machine is."""


async def test_a_device_with_a_wrong_secret_does_not_lock_out_its_neighbour(tmp_path: Path, program_path: Find) -> None:
    with internet(program_path) as net, trio.fail_after(SLOW_MACHINE):
        relay, nat, good, bad = (net.machine(word) for word in ("relay", "nat", "good", "bad"))
        net.wire(relay, RELAY, nat, NAT)
        for machine, gateway, address in ((good, "10.77.1.1", "10.77.1.2"), (bad, "10.77.2.1", "10.77.2.2")):
            net.wire(nat, gateway, machine, address)
            machine.must("ip", "route", "add", "default", "via", gateway)
        nat.masquerade()
        init = [*DAEMON, "init", "--host", RELAY, "--output", str(tmp_path / "relay")]
        printed = (await trio.run_process(init, capture_stdout=True, capture_stderr=True)).stdout.decode()
        secret, *words = shlex.split(printed)
        options = dict(itertools.pairwise(words))
        access = ["--relay", options["--relay"], "--pin", options["--pin"]]
        environment = os.environ | dict([secret.split("=", 1)])
        config = tmp_path / "relay" / "tunnel.toml"
        text = config.read_text().replace('role = "user"', 'role = "admin"')
        config.write_text(text.replace("[control]", PENALTY, 1))
        serve = [*DAEMON, "--config", str(config), "--log-format", "json"]

        async def run(machine: Namespace, *arguments: str, name: str = "", secret: str = "") -> tuple[int, str]:
            known = {"TUNNEL_SECRET": secret} if secret else {}
            command = tunnel_command(*arguments, *access, "--credential", name or options["--credential"])
            process = await trio.run_process(
                machine.command(*command),
                check=False,
                capture_stdout=True,
                stderr=subprocess.STDOUT,
                env=environment | known,
            )
            return process.returncode, process.stdout.decode()

        async def fail(name: str) -> str:
            status, text = await run(bad, "list", name=name, secret="not the secret")
            assert status != os.EX_OK
            return text

        async with program(relay.command(*serve), stderr=subprocess.PIPE) as daemon:
            await wait_ready(daemon)
            for _ in range(3):
                assert "check the name and the secret" in await fail("laptop")
            text = await fail("laptop")
            assert "this name is blocked for" in text
            assert "check the name" not in text
            assert (await run(good, "list"))[0] == os.EX_OK
            for name in ("guess", "another"):
                await fail(name)
            assert "this address is blocked for" in await fail("third")
            status, shown = await run(good, "penalties", "--json")
            assert status == os.EX_OK
            assert {"address": NAT, "scope": "address"}.items() <= json.loads(shown.splitlines()[0]).items()
            assert await run(good, "pardon", NAT) == (os.EX_OK, f"pardoned {NAT}\n")
            assert "check the name and the secret" in await fail("third")
