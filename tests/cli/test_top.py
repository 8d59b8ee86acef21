"""`tunnel top` against a relay: on a terminal, and for scripts."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import trio

from tests.agent.support import PATIENCE, relay_here
from tests.support.peers import connect
from tests.support.programs import run, tunnel_command
from tests.support.terminal import Terminal, on_terminal
from tunneld.client import Client
from tunneld.net.endpoint import Endpoint, format_peer


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    with Terminal() as made:
        yield made


async def open_tunnel(client: Client, name: str) -> Endpoint:
    """Open a tunnel; returns where visitors connect."""
    record = await client.open_described("tcp", name=name, persist=True)
    return Endpoint.parse(record["client"])


async def test_a_visitor_is_found_and_kicked(terminal: Terminal) -> None:
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay, relay.access.connect() as client:
            public = await open_tunnel(client, "blog")
            server = await connect(Endpoint.parse((await client.show("blog"))[0]["server"]))
            visitor = await connect(public)
            await visitor.send_all(b"hello")
            assert await server.receive_some() == b"hello"
            top = tunnel_command("top", "--relay", relay.where, "--interval", "0.5")
            async with on_terminal(terminal, *top) as process:
                await terminal.wait_for("blog")
                terminal.type("\r")
                await terminal.wait_for("escape tunnels")
                await terminal.wait_for(format_peer(visitor.socket.getsockname()))
                terminal.type("k")
                await terminal.wait_for("tunnel kick t1 127.0.0.1:")
                terminal.type("y")
                await terminal.wait_for("disconnected 1 visitor")
                with pytest.raises(trio.BrokenResourceError):
                    await visitor.receive_some()
                relay.hang_up()
                await terminal.wait_for("trying again")
                terminal.type("q")
                assert await process.wait() == 0
                assert terminal.echoes()


@pytest.mark.parametrize("words", [(), ("blog",)], ids=["tunnels", "visitors"])
async def test_once_prints_a_table_for_scripts(words: tuple[str, ...]) -> None:
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay, relay.access.connect() as client:
            public = await open_tunnel(client, "blog")
            await connect(public)
            once = ("top", *words, "--once", "--interval", "0.5", "--relay", relay.where)
            fields = (await run(tunnel_command(*once))).splitlines()
            records = [json.loads(line) for line in (await run(tunnel_command(*once, "--json"))).splitlines()]
            if words:
                assert (fields, records) == ([], [])  # it waits for a server, and is no visitor yet
            else:
                assert [line.split("\t")[:3] for line in fields] == [["t1", "blog", str(public)]]
                assert [(record["up_rate"], record["down_rate"]) for record in records] == [(0, 0)]


async def test_without_a_terminal_top_says_what_to_do() -> None:
    async with relay_here() as relay:
        done = await trio.run_process(
            tunnel_command("top", "--relay", relay.where), check=False, capture_stderr=True, capture_stdout=True
        )
    assert done.returncode == 64
    assert done.stderr.decode() == "tunnel: `tunnel top` needs a terminal; use --once to print a table\n"


@pytest.mark.parametrize("interval", ["0.4", "3601", "x"])
async def test_the_interval_has_limits(interval: str) -> None:
    done = await trio.run_process(
        tunnel_command("top", "--interval", interval), check=False, capture_stderr=True, capture_stdout=True
    )
    assert done.returncode == 64
    assert "a number of seconds" in done.stderr.decode()
