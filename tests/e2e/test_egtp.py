"""A web server exposed with `--backend egtp`: host names, TCP ports, reload, and the loss of the agent's connection."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import trio

from tests.support.named import named
from tests.support.peers import PATIENCE
from tests.support.programs import EGTP, daemon, program, tunnel_command
from tests.support.system import find_program
from tunneld.net.endpoint import Endpoint


async def curl(*words: str) -> str:
    """Run curl."""
    done = await trio.run_process([find_program("curl"), "-sS", "--max-time", "20", *words], capture_stdout=True)
    return done.stdout.decode()


async def web(folder: Path, nursery: trio.Nursery) -> str:
    """A web server; returns its port."""
    (folder / "index.html").write_text("hello over egtp\n")
    (folder / "large").write_bytes(bytes(range(256)) * 32768)
    command = ["python3", "-u", "-m", "http.server", "--bind", "127.0.0.1", "--directory", str(folder), "0"]
    process = await trio.lowlevel.open_process(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    nursery.start_soon(_kill_at_end, process)
    assert process.stdout is not None
    line = b""
    while b"http://" not in line:
        line += await process.stdout.receive_some(200)
    return line.decode().partition("port ")[2].split()[0]


async def _kill_at_end(process: trio.Process) -> None:
    try:
        await trio.sleep_forever()
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()


async def test_a_web_server_is_open_to_any_browser_by_its_host_name(tmp_path: Path) -> None:
    pages = tmp_path / "pages"
    pages.mkdir()
    async with trio.open_nursery() as nursery:
        target = await web(pages, nursery)
        async with named(tmp_path, {"blog": target}, way="egtp", words=EGTP) as site:
            host = "blog.t.example.org"
            assert await curl("-H", f"Host: {host}", site.url("/")) == "hello over egtp\n"
            out = tmp_path / "large"
            await curl("-H", f"Host: {host}", "-o", str(out), site.url("/large"))
            assert out.read_bytes() == (pages / "large").read_bytes()
        nursery.cancel_scope.cancel()


async def test_the_relays_key_is_kept(tmp_path: Path) -> None:
    nodes = []
    for _ in range(2):
        async with daemon(tmp_path, words=EGTP) as relay:
            uri = Endpoint.parse((await relay.wait_logged("egtp listens"))["uri"])
            assert uri.scheme == "egtp"
            nodes.append((tmp_path / "state" / "egtp_key").read_bytes())
    assert nodes[0] == nodes[1]


async def test_a_browser_gets_its_page_from_an_agent_that_holds_no_connection(tmp_path: Path) -> None:
    pages = tmp_path / "pages"
    pages.mkdir()
    async with trio.open_nursery() as nursery:
        target = await web(pages, nursery)
        async with named(tmp_path, {"blog": target}, "--poll", "1", way="egtp", words=EGTP) as site:
            host = "blog.t.example.org"
            assert await curl("-H", f"Host: {host}", site.url("/")) == "hello over egtp\n"
            out = tmp_path / "large"
            await curl("-H", f"Host: {host}", "-o", str(out), site.url("/large"))
            assert out.read_bytes() == (pages / "large").read_bytes()
        nursery.cancel_scope.cancel()


async def opened_by(agent: trio.Process) -> dict[str, str]:
    """The first event of an agent: it has opened a tunnel."""
    assert agent.stdout is not None
    line = b""
    with trio.fail_after(PATIENCE):
        while not line.endswith(b"\n"):
            chunk = await agent.stdout.receive_some(1)
            assert chunk, "the agent ended"
            line += chunk
    event: dict[str, str] = json.loads(line)
    return event


async def test_a_plan_may_poll(tmp_path: Path) -> None:
    pages = tmp_path / "pages"
    pages.mkdir()
    async with trio.open_nursery() as nursery:
        target = await web(pages, nursery)
        async with daemon(tmp_path, words=EGTP) as relay:
            plan = tmp_path / "expose.toml"
            plan.write_text(
                f'[relay]\nwhere = "{relay.control}"\n[expose.blog]\ntarget = {target}\nbackend = "egtp"\npoll = 1\n'
            )
            words = ["up", "--file", str(plan), "--json"]
            async with program(tunnel_command(*words), stdout=subprocess.PIPE) as agent:
                address = Endpoint.parse((await opened_by(agent))["address"])
                assert await curl(f"http://{address.authority}/") == "hello over egtp\n"
        nursery.cancel_scope.cancel()


async def test_a_reload_and_a_restart_in_place_keep_the_tunnel(tmp_path: Path) -> None:
    """Visitors survive the reload; after the restart, the agent is back at the same server URI."""
    pages = tmp_path / "pages"
    pages.mkdir()
    async with trio.open_nursery() as nursery:
        target = await web(pages, nursery)
        async with daemon(tmp_path, words=EGTP) as relay:
            command = ["expose", target, "--relay", relay.control, "--backend", "egtp", "--json"]
            async with program(tunnel_command(*command), stdout=subprocess.PIPE) as agent:
                opened = await opened_by(agent)
                address = Endpoint.parse(opened["address"])
                async with await trio.open_tcp_stream(address.host, address.port) as visitor:
                    await visitor.send_all(b"GET / HTTP/1.1\r\n")
                    config = tmp_path / "tunnel.toml"
                    config.write_text(config.read_text() + "patience = 1.0\nresume_timeout = 20.0\n")
                    assert "OK" in await relay.ask("reload")
                    await visitor.send_all(b"Host: blog\r\nConnection: close\r\n\r\n")
                    assert b"hello over egtp" in b"".join([chunk async for chunk in visitor])
                assert "OK" in await relay.ask("restart")
                await relay.wait_logged("ready", 2)
                assert await curl(f"http://{address.authority}/")
                said = await relay.ask("list")
                assert opened["uri"] in said
                assert str(address) in said
        nursery.cancel_scope.cancel()
