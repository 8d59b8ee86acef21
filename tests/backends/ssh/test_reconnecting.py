"""A client that reconnects gets its tunnel and port back, and does not displace a client that is alive."""

from __future__ import annotations

import signal
from pathlib import Path

import structlog
import trio

from tests.agent.support import echo, local_server, unused_port
from tests.agent.test_expose import ask
from tests.backends.ssh.support import client, make_key, openssh, relay, side_of
from tests.support.credentials import credential
from tests.support.peers import PATIENCE, connect, read_exactly
from tunneld.backends.ssh.fast import FastConnection
from tunneld.backends.ssh.forwards import Forward, label_of
from tunneld.backends.ssh.login import SshLogin

LOCAL = "127.0.0.1"


async def test_a_client_that_reconnects_after_a_loss_gets_its_tunnel_and_its_waiting_visitors(tmp_path: Path) -> None:
    key, line = make_key(tmp_path)
    with trio.fail_after(PATIENCE):
        async with relay([credential("me", authorized_keys=[line])]) as here, local_server(echo) as target:
            command = openssh(here, "-N", "-R", f"0:{LOCAL}:{target.port}", LOCAL, key=key)
            async with client(command) as first:
                (tunnel,) = await here.until_served()
                first.process.send_signal(signal.SIGKILL)  # without a disconnect message
                await here.until(lambda: not tunnel.parked)
            visitor = await connect(tunnel.client_uri)
            await visitor.send_all(b"hello")
            await here.until(lambda: bool(tunnel.waiting))
            async with client(command) as second:
                assert await second.port() == tunnel.client_uri.port
                assert await read_exactly(visitor, 5) == b"hello"
                assert here.tunnel is tunnel


async def test_a_client_that_disconnects_closes_its_tunnel_and_gets_its_port_back_later() -> None:
    with trio.fail_after(PATIENCE):
        async with relay() as here:
            ports = []
            for _ in range(2):
                async with client(openssh(here, "-N", "-R", f"0:{LOCAL}:9", LOCAL)) as ssh:
                    ports.append(await ssh.port())
                    (tunnel,) = await here.until_served()
                    ssh.process.send_signal(signal.SIGTERM)
                    await tunnel.wait_closed()
                    assert tunnel.reason == "the ssh client disconnected"
            assert ports[0] == ports[1]


async def test_an_unresponsive_client_is_replaced_within_the_patience() -> None:
    with trio.fail_after(PATIENCE):
        async with relay(patience=0.2) as here, local_server(echo) as target:
            command = openssh(here, "-N", "-R", f"0:{LOCAL}:{target.port}", LOCAL)
            async with client(command) as first:
                (tunnel,) = await here.until_served()
                first.process.send_signal(signal.SIGSTOP)
                async with client(command) as second:
                    assert await second.port() == tunnel.client_uri.port
                    assert await ask(tunnel.client_uri, b"hello") == b"hello"
                    assert len(side_of(tunnel).carriers) == 1
                first.process.send_signal(signal.SIGKILL)


async def test_equal_clients_that_are_alive_get_a_tunnel_each() -> None:
    with trio.fail_after(PATIENCE):
        async with relay() as here, local_server(echo) as target:
            command = openssh(here, "-N", "-R", f"0:{LOCAL}:{target.port}", LOCAL)
            async with client(command), client(command), client(command):
                tunnels = await here.until_served(3)
                names = [tunnel.spec.options.name for tunnel in tunnels]
                assert names[1:] == [f"{names[0]}-2", f"{names[0]}-3"]
                for tunnel in tunnels:
                    assert await ask(tunnel.client_uri, b"hello") == b"hello"


async def test_a_port_of_a_dead_client_is_free_for_the_same_credential_at_once(tmp_path: Path) -> None:
    (key, line), port = make_key(tmp_path), unused_port()
    with trio.fail_after(PATIENCE):
        async with (
            relay([credential("me", authorized_keys=[line])], patience=0.2) as here,
            local_server(echo) as target,
        ):
            forward = ["-N", "-R", f"{port}:{LOCAL}:{target.port}", LOCAL]
            async with client(openssh(here, *forward, key=key, user="one")) as first:
                (tunnel,) = await here.until_served()
                first.process.send_signal(signal.SIGSTOP)
                async with client(openssh(here, *forward, key=key, user="two")):
                    await tunnel.wait_closed()
                    (other,) = await here.until_served()
                    assert (other.client_uri.port, await ask(other.client_uri, b"hello")) == (port, b"hello")
                first.process.send_signal(signal.SIGKILL)


async def test_a_reserved_port_is_free_for_the_same_credential(tmp_path: Path) -> None:
    (key, line), port = make_key(tmp_path), unused_port()
    with trio.fail_after(PATIENCE):
        async with relay([credential("me", authorized_keys=[line])]) as here:
            forward = ["-N", "-R", f"{port}:{LOCAL}:9", LOCAL]
            for user in ("one", "two"):
                async with client(openssh(here, *forward, key=key, user=user)) as ssh:
                    (tunnel,) = await here.until_served()
                    ssh.process.send_signal(signal.SIGTERM)
                    await tunnel.wait_closed()


async def test_a_port_of_a_live_client_is_not_taken_over(tmp_path: Path) -> None:
    port = unused_port()
    with trio.fail_after(PATIENCE):
        async with relay() as here, client(openssh(here, "-N", "-R", f"{port}:{LOCAL}:9", LOCAL, user="one")):
            (tunnel,) = await here.until_served()
            only_with_it = "-oExitOnForwardFailure=yes"  # waits for the reply, which a command could overtake
            command = openssh(here, "-N", only_with_it, "-R", f"{port}:{LOCAL}:9", LOCAL, user="two")
            async with client(command) as second:
                await second.wait_output("remote port forwarding failed")
                assert await second.ended() != 0
            assert here.tunnel is tunnel


async def test_a_tunnel_whose_client_does_not_reconnect_closes_after_open_timeout() -> None:
    with trio.fail_after(PATIENCE):
        async with (
            relay(tunnels={"open_timeout": 0.1}) as here,
            client(openssh(here, "-N", "-R", f"0:{LOCAL}:9", LOCAL)) as ssh,
        ):
            (tunnel,) = await here.until_served()
            ssh.process.send_signal(signal.SIGKILL)
            await tunnel.wait_closed()


async def test_a_hanging_client_is_dropped_within_three_heartbeats() -> None:
    with trio.fail_after(PATIENCE):
        async with (
            relay(heartbeat=0.2, patience=0.1) as here,
            client(openssh(here, "-N", "-R", f"0:{LOCAL}:9", LOCAL)) as ssh,
        ):
            (tunnel,) = await here.until_served()
            (forward,) = side_of(tunnel).carriers
            assert forward.heartbeat is not None
            ssh.process.send_signal(signal.SIGSTOP)
            await here.until(lambda: not side_of(tunnel).carriers)
            ssh.process.send_signal(signal.SIGKILL)


def test_the_label_has_the_user_name_and_depends_on_key_and_request() -> None:
    names = {
        label_of(SshLogin(user, proof=proof), request)
        for user in ("alice", "../b ö", "")
        for proof in ("", "SHA256:x")
        for request in ("localhost:0:1", "localhost:0:2")
    }
    assert len(names) == 12
    assert {name.rpartition("-")[0] for name in names} == {"alice", "b", "ssh"}
    assert label_of(SshLogin("-" * 3 + "x" * 200), "").startswith("x" * 50)


async def test_a_new_client_that_is_lost_during_the_keepalive_of_the_former_changes_nothing() -> None:
    with trio.fail_after(PATIENCE), structlog.testing.capture_logs() as logged:
        async with relay(patience=2.0) as here, local_server(echo) as target:
            command = openssh(here, "-N", "-R", f"0:{LOCAL}:{target.port}", LOCAL)
            async with client(command) as first:
                (tunnel,) = await here.until_served()
                (forward,) = side_of(tunnel).carriers
                assert isinstance(forward, Forward)
                connection = forward.carrier.connection
                assert isinstance(connection, FastConnection)
                first.process.send_signal(signal.SIGSTOP)
                async with client(command) as second:
                    await here.until(lambda: connection.pending_keepalives > 0)
                    second.process.send_signal(signal.SIGKILL)
                    await here.until(lambda: [line["event"] for line in logged].count("ssh client disconnected") >= 1)
                first.process.send_signal(signal.SIGKILL)
            async with client(command) as third:
                assert await third.port() == tunnel.client_uri.port
                assert await ask(tunnel.client_uri, b"hello") == b"hello"
    assert [line for line in logged if line["log_level"] == "error"] == []
