"""Options of openTunnel apply to tunnels with an ssh client."""

from __future__ import annotations

from contextlib import suppress

import trio

from tests.agent.support import echo, local_server
from tests.backends.ssh.support import client, openssh, relay
from tests.support.peers import PATIENCE, connect, is_dropped, read_exactly

LOCAL = "127.0.0.1"


async def test_the_local_server_receives_the_proxy_header_first() -> None:
    with trio.fail_after(PATIENCE):
        async with relay() as here, local_server(echo) as target:
            tunnel = await here.open(proxy_protocol="v1")
            forward = openssh(here, "-N", "-R", f"0:{LOCAL}:{target.port}", LOCAL, user=tunnel.server_uri.key)
            async with client(forward):
                await here.until_served()
                visitor = await connect(tunnel.client_uri, source="127.0.0.9")
                port = visitor.socket.getsockname()[1]
                header = f"PROXY TCP4 127.0.0.9 127.0.0.1 {port} {tunnel.client_uri.port}\r\n".encode()
                await visitor.send_all(b"hello")
                assert await read_exactly(visitor, len(header) + 5) == header + b"hello"


async def test_an_exhausted_quota_closes_the_tunnel_and_is_reported_to_the_session() -> None:
    with trio.fail_after(PATIENCE):
        async with (
            relay(tunnels={"quota": 1000}) as here,
            local_server(echo) as target,
            client(openssh(here, "-R", f"0:{LOCAL}:{target.port}", LOCAL)) as ssh,
        ):
            await ssh.wait_output("server URI      ssh://", "out")
            tunnel = here.tunnel
            visitor = await connect(tunnel.client_uri)
            with suppress(trio.BrokenResourceError):
                await visitor.send_all(bytes(5000))
                while await visitor.receive_some():
                    pass
            await ssh.wait_output(r"Received disconnect .* quota of 1000 bytes is used up")
            assert await ssh.ended() == 255
            assert sum(tunnel.octets) <= 1000


async def test_a_one_shot_tunnel_serves_one_visitor() -> None:
    with trio.fail_after(PATIENCE):
        async with relay() as here, local_server(echo) as target:
            tunnel = await here.open(persist="no")
            forward = openssh(here, "-N", "-R", f"0:{LOCAL}:{target.port}", LOCAL, user=tunnel.server_uri.key)
            async with client(forward) as ssh:
                await here.until_served()
                visitor = await connect(tunnel.client_uri)
                await visitor.send_all(b"hello")
                assert await read_exactly(visitor, 5) == b"hello"
                assert await is_dropped(await connect(tunnel.client_uri))
                await visitor.aclose()
                await tunnel.wait_closed()
                await ssh.ended()


async def test_closing_a_tunnel_ends_its_forward_and_no_other() -> None:
    with trio.fail_after(PATIENCE):
        async with relay() as here, local_server(echo) as target:
            forwards = [word for _ in range(2) for word in ("-R", f"0:{LOCAL}:{target.port}")]
            forwards[3] = f"0:localhost:{target.port}"
            async with client(openssh(here, *forwards, LOCAL)) as ssh:
                first, second = await here.until_served(2)
                await ssh.wait_output("(?s)server URI.*server URI", "out")
                await here.service.close(first.id)
                await ssh.wait_output(rf"tunnel {first.id} closed: closed by request", "out")
                visitor = await connect(second.client_uri)
                await visitor.send_all(b"hello")
                assert await read_exactly(visitor, 5) == b"hello"
                await here.service.close(second.id)
                await ssh.ended()
                await ssh.wait_output("Received disconnect .* closed by request")
