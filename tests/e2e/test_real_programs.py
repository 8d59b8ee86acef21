"""A real daemon, and real programs on both sides of its tunnels."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import xmlrpc.client
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from tests.support.peers import PATIENCE, connect, is_dropped, is_refused, read_all, read_exactly
from tests.support.pki import Pki
from tests.support.programs import Daemon, daemon, free_port, listening, program, tunnel_command
from tunneld import client
from tunneld.net.endpoint import Endpoint

MIB = 1 << 20
Find = Callable[[str], str]


async def opened(relay: Daemon, words: str = "") -> tuple[Endpoint, Endpoint]:
    """Open a tunnel over the control port; returns its server URI and client URI."""
    server = (await relay.ask(f"openTunnel tcp {words}")).splitlines()[1].removeprefix("OK ")
    client = (await relay.ask(f"getTunnelAddress {server}")).splitlines()[1].removeprefix("OK ")
    return Endpoint.parse(server), Endpoint.parse(client)


@asynccontextmanager
async def exposed(relay: Daemon, target: str, *options: str) -> AsyncIterator[Endpoint]:
    """Run `tunnel expose`, and yield the public address that it printed."""
    command = tunnel_command("expose", target, "--relay", relay.control, *options)
    async with program(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as agent:
        assert agent.stdout is not None
        line = b""
        with trio.fail_after(PATIENCE):
            while not line.endswith(b"\n"):
                line += await agent.stdout.receive_some(1)
        yield Endpoint.parse(line.decode().strip())


@asynccontextmanager
async def nginx(folder: Path, find: Find) -> AsyncIterator[bytes]:
    """Run nginx on a Unix socket in `folder` with one file of 8 MiB, and yield the contents of the file."""
    page = bytes(range(256)) * (8 * MIB // 256)
    configuration = prepare_nginx(folder, page)
    async with program([find("nginx"), "-c", str(configuration)], stderr=subprocess.DEVNULL):
        yield page


def prepare_nginx(folder: Path, page: bytes) -> Path:
    """Write the files of nginx; returns its configuration file."""
    (folder / "www").mkdir()
    (folder / "www" / "file").write_bytes(page)
    configuration = folder / "nginx.conf"
    temporary = " ".join(f"{kind}_temp_path {folder};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    configuration.write_text(f"""
        daemon off; master_process off; pid {folder}/pid; error_log {folder}/error.log;
        events {{}}
        http {{ access_log off; {temporary} server {{ listen unix:{folder}/web.sock; root {folder}/www; }} }}
    """)
    return configuration


async def curl(find: Find, url: str, *options: str) -> bytes:
    """Run curl, with retries while the server is starting; returns the response."""
    command = [find("curl"), "-sS", "--fail", "--max-time", "20", "--retry", "20", "--retry-all-errors", *options, url]
    done = await trio.run_process(command, capture_stdout=True)
    return bytes(done.stdout)


async def test_nc_opens_a_tunnel_and_socat_is_the_hidden_server(tmp_path: Path, program_path: Find) -> None:
    socat, nc = program_path("socat"), program_path("nc")
    async with daemon(tmp_path) as relay:
        command = [nc, "-N", "127.0.0.1", str(relay.control_port)]
        said = await trio.run_process(command, stdin=b"openTunnel tcp persist=yes\nquit\n", capture_stdout=True)
        greeting, server, bye = said.stdout.decode().splitlines()
        assert greeting.startswith("OK tunneld ")
        assert bye == "OK bye"
        server_uri = Endpoint.parse(server.removeprefix("OK "))
        client = (await relay.ask(f"getTunnelAddress {server_uri}")).splitlines()[1].removeprefix("OK ")
        async with program([socat, f"TCP:{server_uri.authority}", "EXEC:cat"]):
            visitor = [nc, "-N", "127.0.0.1", str(Endpoint.parse(client).port)]
            echoed = await trio.run_process(visitor, stdin=b"there and back", capture_stdout=True)
            assert echoed.stdout == b"there and back"


async def test_openssl_as_hidden_server_presents_the_key(tmp_path: Path, program_path: Find) -> None:
    """Run the example in THE KEY of tunneld-control(7), with key and ports filled in."""
    pki = Pki.issue(tmp_path / "pki")
    context = pki.client
    async with daemon(tmp_path, pki=pki) as relay, nginx(tmp_path, program_path) as page:
        port = await free_port()
        bridge = [
            program_path("socat"),
            f"TCP-LISTEN:{port},bind=127.0.0.1,fork,reuseaddr",
            f"UNIX:{tmp_path}/web.sock",
        ]
        async with (
            client.connect(f"tls://127.0.0.1:{relay.control_port}", tls=context) as operator,
            listening(bridge, port),
        ):
            uri = Endpoint.parse(await operator.open_tunnel(persist=True, secure="yes"))
            visitors = await operator.get_tunnel_address(str(uri))
            page_of_manual = (Path(__file__).parents[2] / "man/tunneld-control.7").read_text()
            recipe = page_of_manual.partition("\nmkfifo back\n")[2].partition("\n.Ed")[0].replace("\\e", "\\")
            for word, meant in (
                ("KEY", uri.key),
                ("relay.pem", str(pki.folder / "ca.pem")),
                ("relay.example.org:PORT", uri.authority),
                ("nc 127.0.0.1 8000", f"{program_path('nc')} -N 127.0.0.1 {port}"),
            ):
                assert word in recipe
                recipe = recipe.replace(word, meant)
            script = f"cd {tmp_path}; mkfifo back; {recipe}"
            program_path("openssl")
            quiet = {"stderr": subprocess.DEVNULL, "start_new_session": True}
            async with program(["sh", "-c", script], **quiet) as shell:
                try:
                    url = visitors.replace("tcp://", "http://") + "/file"
                    for _ in range(2):
                        assert await curl(program_path, url) == page
                finally:
                    os.killpg(shell.pid, signal.SIGKILL)


async def test_curl_reaches_nginx_through_the_agent(tmp_path: Path, program_path: Find) -> None:
    web = f"unix:{tmp_path}/web.sock"
    async with nginx(tmp_path, program_path) as page, daemon(tmp_path) as relay, exposed(relay, web) as address:
        assert await curl(program_path, f"http://{address.authority}/file") == page


async def test_a_protocol_in_which_the_server_sends_first(tmp_path: Path, program_path: Find) -> None:
    sshd, keygen, keyscan = (program_path(name) for name in ("sshd", "ssh-keygen", "ssh-keyscan"))
    key = tmp_path / "key"
    await trio.run_process([keygen, "-q", "-t", "ed25519", "-N", "", "-f", str(key)])
    server = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = server[0].socket.getsockname()[1]
    await server[0].aclose()
    options = ["-D", "-e", "-f", "/dev/null", "-h", str(key), "-p", str(port), "-o", "ListenAddress=127.0.0.1"]
    await trio.Path("/run/sshd").mkdir(exist_ok=True)  # where sshd insists on an empty folder; its package makes it
    async with program([sshd, *options], stderr=subprocess.PIPE) as hidden, daemon(tmp_path) as relay:
        assert hidden.stderr is not None
        assert b"listening" in await hidden.stderr.receive_some()
        async with exposed(relay, str(port)) as address:
            command = [keyscan, "-T", "10", "-t", "ed25519", "-p", str(address.port), "127.0.0.1"]
            found = await trio.run_process(command, capture_stdout=True, capture_stderr=True)
            assert key.with_suffix(".pub").read_text().split()[1].encode() in found.stdout


async def test_the_stock_xmlrpc_client_makes_the_two_calls(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay:

        def call() -> tuple[str, str]:
            with xmlrpc.client.ServerProxy(relay.http) as proxy:
                server_uri = str(proxy.tunnel.openTunnel())
                return server_uri, str(proxy.tunnel.getTunnelAddress(server_uri))

        server_uri, client_uri = await trio.to_thread.run_sync(call)
        server, visitor = await connect(Endpoint.parse(server_uri)), await connect(Endpoint.parse(client_uri))
        await server.send_all(b"hello")
        assert await read_exactly(visitor, 5) == b"hello"


async def test_a_large_transfer_in_both_directions_leaks_no_descriptors(tmp_path: Path) -> None:
    """Twice 64 MiB in each direction: the pump keeps idle pipes after the first transfer, no more after the second."""
    async with daemon(tmp_path) as relay:
        open_after = []
        for _ in range(2):
            server_uri, client_uri = await opened(relay)
            await transfer(await connect(server_uri), await connect(client_uri))
            while not await is_refused(client_uri):
                await trio.lowlevel.checkpoint()
            open_after.append(relay.descriptors)
        assert open_after[0] == open_after[1]
        closed = await relay.wait_logged("tunnel closed")
        assert (closed["up"], closed["down"]) == (64 * MIB, 64 * MIB)


async def transfer(one: trio.SocketStream, other: trio.SocketStream) -> None:
    """Send 64 MiB in each direction at the same time, end both, and compare what arrived."""
    block = hashlib.sha256(b"seed").digest() * (MIB // 32)
    digests: list[str] = []

    async def send(stream: trio.SocketStream) -> None:
        for _ in range(64):
            await stream.send_all(block)
        await stream.send_eof()

    async def receive(stream: trio.SocketStream) -> None:
        digest = hashlib.sha256()
        async for chunk in stream:
            digest.update(chunk)
        digests.append(digest.hexdigest())

    async with trio.open_nursery() as nursery:
        for stream in (one, other):
            nursery.start_soon(send, stream)
            nursery.start_soon(receive, stream)
    assert digests == [hashlib.sha256(block * 64).hexdigest()] * 2


class TestShutdown:
    async def test_a_connection_that_finishes_in_time_is_not_cut(self, tmp_path: Path) -> None:
        async with daemon(tmp_path) as relay:
            server_uri, client_uri = await opened(relay)
            server, visitor = await connect(server_uri), await connect(client_uri)
            await visitor.send_all(b"?")
            assert await read_exactly(server, 1) == b"?"
            relay.process.send_signal(signal.SIGTERM)
            await relay.wait_logged("tunnel draining")
            assert await is_refused(client_uri)
            await server.send_all(b"the whole answer")
            await server.aclose()
            assert await read_all(visitor) == b"the whole answer"
            await visitor.aclose()
            with trio.fail_after(PATIENCE):
                assert await relay.process.wait() == 0

    @pytest.mark.parametrize("how", ["timeout", "second signal"])
    async def test_the_exit_status_says_that_connections_were_cut(self, tmp_path: Path, how: str) -> None:
        async with daemon(tmp_path, drain_timeout=0.2 if how == "timeout" else 60.0) as relay:
            server_uri, client_uri = await opened(relay)
            server, visitor = await connect(server_uri), await connect(client_uri)
            await visitor.send_all(b"?")
            assert await read_exactly(server, 1) == b"?"
            relay.process.send_signal(signal.SIGTERM)
            await relay.wait_logged("tunnel draining")
            if how == "second signal":
                relay.process.send_signal(signal.SIGINT)
            assert await is_dropped(visitor)
            with trio.fail_after(PATIENCE):
                assert await relay.process.wait() == 75

    async def test_shutdown_over_the_control_port_is_answered(self, tmp_path: Path) -> None:
        async with daemon(tmp_path) as relay:
            assert "OK stopping" in await relay.ask("shutdown")
            with trio.fail_after(PATIENCE):
                assert await relay.process.wait() == 0

    async def test_a_reload_of_an_invalid_file_changes_nothing(self, tmp_path: Path) -> None:
        async with daemon(tmp_path) as relay:
            config = tmp_path / "tunnel.toml"
            good = config.read_text()
            config.write_text("[tunnels]\nprots = 1\n")
            assert "ERR config" in await relay.ask("reload")
            config.write_text(good.replace('ports = "0"', 'ports = "0"\nmax_tunnels = 1'))
            assert "key=tunnels.max_tunnels" in await relay.ask("reload")
            await opened(relay)
            assert "ERR limit" in await relay.ask("openTunnel")
