"""The visitor's address through real programs: HAProxy in front of a tunnel, nginx and HAProxy as hidden servers.

curl (127.0.0.9) ──► HAProxy, send-proxy ──► tunnel ──► socat ──► nginx, listen ... proxy_protocol
"""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import trio

from tests.support.haproxy import haproxy
from tests.support.peers import PATIENCE, connect, is_dropped, read_exactly
from tests.support.programs import Daemon, daemon, free_port, listening, program
from tunneld.net.endpoint import Endpoint

Find = Callable[[str], str]
VISITOR = "127.0.0.9"
KEEP_OUT = "deny_from=127.0.0.1,127.0.0.8"
"""The first is the source address of `listening`, whose probe through HAProxy would use up a server connection."""


@asynccontextmanager
async def nginx(folder: Path, find: Find) -> AsyncIterator[int]:
    """Run nginx on a free port; it expects a PROXY header and answers with its contents."""
    path, port, configuration = find("nginx"), await free_port(), folder / "nginx.conf"
    temporary = " ".join(f"{kind}_temp_path {folder};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    said = "$proxy_protocol_addr $proxy_protocol_port $proxy_protocol_server_addr $proxy_protocol_server_port"
    configuration.write_text(f"""
        daemon off; master_process off; pid {folder}/nginx.pid; error_log {folder}/error.log;
        events {{}}
        http {{ access_log off; {temporary}
            server {{ listen 127.0.0.1:{port} proxy_protocol; location / {{ return 200 "{said}"; }} }} }}
    """)
    async with listening([path, "-c", str(configuration)], port):
        yield port


async def trust_loopback(relay: Daemon, folder: Path) -> None:
    """Reload with `trusted_proxies`."""
    config = folder / "tunnel.toml"
    config.write_text(config.read_text().replace('ports = "0"', 'ports = "0"\ntrusted_proxies = ["127.0.0.1"]'))
    assert "key=tunnels.trusted_proxies" in await relay.ask("reload")


async def opened(relay: Daemon, words: str) -> tuple[Endpoint, Endpoint]:
    """Open a tunnel over the control port; returns its server URI and client URI."""
    server = (await relay.ask(f"openTunnel tcp {words}")).splitlines()[1].removeprefix("OK ")
    client = (await relay.ask(f"getTunnelAddress {server}")).splitlines()[1].removeprefix("OK ")
    return Endpoint.parse(server), Endpoint.parse(client)


@asynccontextmanager
async def exposed(relay: Daemon, find: Find, port: int, version: str) -> AsyncIterator[Endpoint]:
    """Run socat as the agent of a local server that expects PROXY headers, and yield the client URI."""
    server_uri, client_uri = await opened(relay, f"persist=yes proxy_protocol={version} {KEEP_OUT}")
    command = [find("socat"), f"TCP:{server_uri.authority}", f"TCP:127.0.0.1:{port}"]
    async with program(command, stderr=subprocess.DEVNULL):
        yield client_uri


async def curl(find: Find, port: int, *options: str) -> tuple[str, int]:
    """Run curl; returns the response and curl's local port."""
    command = [find("curl"), "-sS", "--fail", "--max-time", "20", "--interface", VISITOR, *options]
    command += ["-w", " %{local_port}", f"http://127.0.0.1:{port}/"]
    done = await trio.run_process(command, capture_stdout=True)
    said, _, local_port = done.stdout.decode().rpartition(" ")
    return said, int(local_port)


@pytest.mark.parametrize("version", ["v1", "v2"])
async def test_nginx_as_hidden_server_gets_the_visitor_address(
    tmp_path: Path, program_path: Find, version: str
) -> None:
    async with (
        nginx(tmp_path, program_path) as web,
        daemon(tmp_path) as relay,
        exposed(relay, program_path, web, version) as address,
    ):
        said, port = await curl(program_path, address.port)
        assert said == f"{VISITOR} {port} 127.0.0.1 {address.port}"


@pytest.mark.parametrize("version", ["v1", "v2"])
async def test_haproxy_as_hidden_server_understands_the_header(
    tmp_path: Path, program_path: Find, version: str
) -> None:
    """HAProxy passes the address on in a header of version 1."""
    (hidden,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    behind = f"127.0.0.1:{hidden.socket.getsockname()[1]} send-proxy"
    async with (
        hidden,
        haproxy(tmp_path, program_path, "accept-proxy", behind) as front,
        daemon(tmp_path) as relay,
        exposed(relay, program_path, front, version) as address,
    ):
        visitor = await trio.open_tcp_stream("127.0.0.1", address.port, local_address=VISITOR)
        async with visitor:
            await visitor.send_all(b"hello")
            port = visitor.socket.getsockname()[1]
            expected = f"PROXY TCP4 {VISITOR} 127.0.0.1 {port} {address.port}\r\nhello".encode()
            with trio.fail_after(PATIENCE):
                async with await hidden.accept() as server:
                    assert await read_exactly(server, len(expected)) == expected


@pytest.mark.parametrize("send", ["send-proxy", "send-proxy-v2", "send-proxy-v2 proxy-v2-options unique-id,crc32c"])
async def test_the_address_from_haproxy_is_used_everywhere(tmp_path: Path, program_path: Find, send: str) -> None:
    async with AsyncExitStack() as stack:
        relay = await stack.enter_async_context(daemon(tmp_path))
        await trust_loopback(relay, tmp_path)
        server_uri, client_uri = await opened(relay, f"persist=yes proxy_protocol=v1 {KEEP_OUT}")
        front = await stack.enter_async_context(haproxy(tmp_path, program_path, "", f"{client_uri.authority} {send}"))
        server = await connect(server_uri)
        async with await trio.open_tcp_stream("127.0.0.1", front, local_address="127.0.0.8") as denied:
            await denied.send_all(b"?")
            assert await is_dropped(denied)
        visitor = await trio.open_tcp_stream("127.0.0.1", front, local_address=VISITOR)
        async with visitor:
            await visitor.send_all(b"hello")
            port = visitor.socket.getsockname()[1]
            expected = f"PROXY TCP4 {VISITOR} 127.0.0.1 {port} {front}\r\nhello".encode()
            with trio.fail_after(PATIENCE):
                assert await read_exactly(server, len(expected)) == expected
            assert f"visitor={VISITOR}:{port}" in await relay.ask(f"show {server_uri}")
            refusals = [line for line in relay.log if line["event"] == "connection refused"]
            assert any(line["peer"].startswith("127.0.0.8:") for line in refusals)


@pytest.mark.parametrize(("send", "version"), [("send-proxy", "v2"), ("send-proxy-v2", "v1")])
async def test_the_address_passes_from_haproxy_to_nginx(
    tmp_path: Path, program_path: Find, send: str, version: str
) -> None:
    async with AsyncExitStack() as stack:
        web = await stack.enter_async_context(nginx(tmp_path, program_path))
        relay = await stack.enter_async_context(daemon(tmp_path))
        await trust_loopback(relay, tmp_path)
        address = await stack.enter_async_context(exposed(relay, program_path, web, version))
        behind = f"127.0.0.1:{address.port} {send}"
        front = await stack.enter_async_context(haproxy(tmp_path, program_path, "", behind))
        said, port = await curl(program_path, front)
        assert said == f"{VISITOR} {port} 127.0.0.1 {front}"
        assert await is_dropped(await connect_without_header(address))


async def connect_without_header(address: Endpoint) -> trio.SocketStream:
    """Connect from the proxy's address and send HTTP without a PROXY header."""
    stream = await connect(address)
    await stream.send_all(b"GET / HTTP/1.0\r\n\r\n")
    return stream
