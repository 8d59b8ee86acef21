"""Failures around the relay: the log cannot be written, the clock jumps, peers vanish without closing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from tests.support.attacks import flood
from tests.support.netns import Find, internet
from tests.support.peers import PATIENCE, close_connections, connect, read_exactly
from tests.support.pki import Pki
from tests.support.programs import CONFIG, TLS, free_port, program
from tunneld import client
from tunneld.net.endpoint import Endpoint
from tunneld.tls.contexts import client_tls_context

LINES = 1500
"""Number of refused requests, which log several times as much as a pipe holds."""


@contextmanager
def sink(kind: str) -> Iterator[int]:
    """A descriptor for the log that cannot be written to."""
    if kind == "full disk":
        with Path("/dev/full").open("wb") as full:
            yield full.fileno()
        return
    reads, writes = os.pipe()
    if kind == "reader that left":
        os.close(reads)
    yield writes
    os.close(writes)
    if kind == "reader that sleeps":
        os.close(reads)


@pytest.mark.parametrize("kind", ["full disk", "reader that left", "reader that sleeps"])
async def test_a_log_that_cannot_be_written_only_loses_lines(tmp_path: Path, kind: str) -> None:
    port = await free_port()
    config = tmp_path / "tunnel.toml"
    config.write_text(
        CONFIG.format(drain_timeout=5.0, control=port, ports="0", daemon_lines="") + '[log]\nlevel = "debug"\n'
    )
    command = [sys.executable, "-m", "tunneld", "--config", str(config)]
    with sink(kind) as stderr, trio.fail_after(2 * PATIENCE):
        async with program(command, stderr=stderr) as daemon:
            where = Endpoint("tcp", "127.0.0.1", port)
            await until_it_listens(where)
            async with client.connect(str(where)) as operator:
                uri = Endpoint.parse(await operator.open_tunnel())
                visitors = Endpoint.parse(await operator.get_tunnel_address(str(uri)))
                server, visitor = await connect(uri), await connect(visitors)
                await flood(where, LINES, b"nonsense\n")
                await visitor.send_all(b"still here")
                assert await read_exactly(server, 10) == b"still here"
                assert (await operator.status())["phase"] == "ready"
                close_connections()
            daemon.terminate()
            assert await daemon.wait() == 0


async def until_it_listens(where: Endpoint) -> None:
    while True:
        try:
            await (await trio.open_tcp_stream(where.host, where.port)).aclose()
        except OSError:
            await trio.lowlevel.checkpoint()
        else:
            return


LIBRARIES = ["/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib", "/usr/lib64"]


@pytest.mark.parametrize("jump", ["+3650d", "-3650d"])
async def test_a_clock_jump_ends_no_connection(tmp_path: Path, pki: Pki, program_path: Find, jump: str) -> None:
    """The wall clock jumps by ten years: timeouts do not use it, and a pin has no dates."""
    program_path("faketime")
    library = next(path for folder in LIBRARIES if (path := Path(folder) / "faketime/libfaketimeMT.so.1").exists())
    port, offset = await free_port(), tmp_path / "offset"
    offset.write_text("+0")
    config = tmp_path / "tunnel.toml"
    config.write_text(
        CONFIG.format(drain_timeout=5.0, control=port, ports="0", daemon_lines="") + TLS.format(folder=pki.folder)
    )
    faked = {"LD_PRELOAD": str(library), "FAKETIME_TIMESTAMP_FILE": str(offset), "FAKETIME_NO_CACHE": "1"}
    environment = os.environ | faked | {"DONT_FAKE_MONOTONIC": "1"}
    command = [sys.executable, "-m", "tunneld", "--config", str(config), "--log-format", "json"]
    where = Endpoint("tls", "127.0.0.1", port)
    context = client_tls_context(pin=pki.pin)
    with trio.fail_after(PATIENCE):
        async with program(command, stderr=subprocess.PIPE, env=environment) as daemon:
            await until_it_listens(where)
            async with client.connect(str(where), tls=context) as operator:
                uri = Endpoint.parse(await operator.open_tunnel(name="web", ttl=3600, idle_timeout=600))
                visitors = Endpoint.parse(await operator.get_tunnel_address(str(uri)))
                server, visitor = await connect(uri), await connect(visitors)
                await visitor.send_all(b"before")
                assert await read_exactly(server, 6) == b"before"
                offset.write_text(jump)
                await visitor.send_all(b"after")
                assert await read_exactly(server, 5) == b"after"
                assert [tunnel["name"] for tunnel in await operator.list()] == ["web"]
                async with client.connect(str(where), tls=context) as newcomer:
                    assert (await newcomer.status())["phase"] == "ready"
                    assert (await newcomer.call("reload")).items == []
                close_connections()
            daemon.terminate()
            assert await daemon.wait() == 0
            log = (await daemon.stderr.receive_some(1 << 20)).decode() if daemon.stderr else ""
    years = {line[10:14] for line in log.splitlines()}
    assert len(years) > 1, "the clock did not jump"


async def test_peers_that_vanish_are_detected(tmp_path: Path, program_path: Find) -> None:
    """All packets from and to the peers are dropped from some moment on, so there is no EOF and no reset."""
    with internet(program_path) as net:
        machine = net.machine("alone")
        machine.must("nft", "list", "tables")
        script = [sys.executable, "-m", "tests.adversarial.half_open", str(tmp_path), program_path("nft")]
        done = await trio.run_process(machine.command(*script), check=False, capture_stdout=True, capture_stderr=True)
        assert done.returncode == 0, done.stderr.decode()
