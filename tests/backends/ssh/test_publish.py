"""Publishing a local server with one command of OpenSSH."""

from __future__ import annotations

import socket
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from tests.agent.support import echo, local_server, unused_port
from tests.agent.test_expose import ask
from tests.backends.ssh.support import Relay, client, make_key, openssh, public_address, relay
from tests.support.credentials import credential
from tests.support.peers import PATIENCE, connect, is_dropped, is_refused, read_exactly
from tests.support.system import find_program
from tunneld.control.commands import COMMANDS
from tunneld.errors import NotAllowedError, UsageError
from tunneld.policy.access import Role

LOCAL = "127.0.0.1"


async def test_a_forward_without_a_session_prints_the_port_and_relays() -> None:
    with trio.fail_after(PATIENCE):
        async with (
            relay() as here,
            local_server(echo) as target,
            client(openssh(here, "-N", "-R", f"0:{LOCAL}:{target.port}", LOCAL)) as ssh,
        ):
            port = await ssh.port()
            assert port == here.tunnel.client_uri.port
            assert await ask(public_address(port), b"x" * 300_000) == b"x" * 300_000
            assert here.tunnel.served == 1


async def test_a_session_shows_both_addresses_and_counts_until_ctrl_c() -> None:
    with trio.fail_after(PATIENCE):
        async with relay() as here, local_server(echo) as target:
            command = openssh(here, "-tt", "-R", f"0:{LOCAL}:{target.port}", LOCAL)
            async with client(command) as ssh:
                await ssh.wait_output(r"visitors 0, served 0", "out")
                tunnel = here.tunnel
                assert str(tunnel.client_uri) in ssh.out
                assert str(tunnel.server_uri) in ssh.out
                visitor = await connect(tunnel.client_uri)
                await visitor.send_all(b"hello")
                assert await read_exactly(visitor, 5) == b"hello"
                await ssh.wait_output(r"visitors 1, served 1, up 5 B, down 5 B", "out")
                await ssh.process.stdin.send_all(b"\x03")  # type: ignore[union-attr]
                assert await ssh.ended() == 0
                assert await is_dropped(visitor)
                await tunnel.wait_closed()
                assert tunnel.reason == "closed by its owner"


async def test_without_a_terminal_the_output_is_plain_lines() -> None:
    with trio.fail_after(PATIENCE):
        async with (
            relay() as here,
            local_server(echo) as target,
            client(openssh(here, "-R", f"0:{LOCAL}:{target.port}", LOCAL)) as ssh,
        ):
            await ssh.process.stdin.aclose()  # type: ignore[union-attr]
            await ssh.wait_output(r"server URI      ssh://", "out")
            assert "\r" not in ssh.out
            assert "\x1b" not in ssh.out
            assert await ask(here.tunnel.client_uri, b"still there") == b"still there"


async def test_qr_draws_the_address() -> None:
    with trio.fail_after(PATIENCE):
        async with (
            relay() as here,
            local_server(echo) as target,
            client(openssh(here, "-R", f"0:{LOCAL}:{target.port}", LOCAL, "qr", "https")) as ssh,
        ):
            await ssh.wait_output(r"https://127.0.0.1:\d+/", "out")
            assert "█" in ssh.out


async def test_several_forwards_are_several_tunnels() -> None:
    async def other(stream: trio.SocketStream) -> None:
        await stream.send_all(b"the other")

    with trio.fail_after(PATIENCE):
        async with relay() as here, local_server(echo) as one, local_server(other) as two:
            forwards = ["-R", f"0:{LOCAL}:{one.port}", "-R", f"0:{LOCAL}:{two.port}"]
            async with client(openssh(here, "-N", *forwards, LOCAL)):
                first, second = await here.until_served(2)
                assert first.spec.options.name != second.spec.options.name
                assert await ask(first.client_uri, b"echo") == b"echo"
                assert await ask(second.client_uri, b"") == b"the other"


async def test_a_port_can_be_requested_and_a_forward_cancelled(tmp_path: Path) -> None:
    control, port = tmp_path / "c", unused_port()
    with trio.fail_after(PATIENCE):
        async with relay() as here, local_server(echo) as target:
            forward = f"{port}:{LOCAL}:{target.port}"
            async with client(openssh(here, "-N", "-M", "-S", control, "-R", forward, LOCAL)):
                (tunnel,) = await here.until_served()
                assert tunnel.client_uri.port == port
                assert await ask(tunnel.client_uri, b"hello") == b"hello"
                await trio.run_process([find_program("ssh"), "-S", str(control), "-O", "cancel", "-R", forward, LOCAL])
                await tunnel.wait_closed()
                assert await is_refused(public_address(port))
                await trio.run_process(
                    [find_program("ssh"), "-S", str(control), "-O", "forward", "-R", f"0:{LOCAL}:{target.port}", LOCAL],
                    capture_stdout=True,
                )
                (other,) = await here.until_served()
                assert await ask(other.client_uri, b"again") == b"again"


@pytest.mark.parametrize("flags", [[], ["-T"], ["-tt"]])
async def test_a_client_without_a_forward_is_told_how_and_ends(flags: list[str]) -> None:
    with trio.fail_after(PATIENCE):
        async with relay() as here, client(openssh(here, *flags, LOCAL)) as ssh:
            assert await ssh.ended() == UsageError.exit_status
            await ssh.wait_output("add -R 0:localhost:PORT to open a tunnel")


REFUSED = [
    ("name:80:127.0.0.1:9", r"cannot listen on 'name': this relay has no host names; for a port, use -R 0:HOST:PORT"),
    ("/tmp/socket:127.0.0.1:9", r"cannot listen on '/tmp/socket': this relay forwards ports only"),
]


@pytest.mark.parametrize(("forward", "reason"), REFUSED)
async def test_an_unsupported_forward_is_refused_with_a_reason(forward: str, reason: str) -> None:
    with trio.fail_after(PATIENCE):
        async with relay() as here:
            async with client(openssh(here, "-R", forward, LOCAL, "list")) as ssh:
                assert await ssh.ended() == 0
                await ssh.wait_output(reason)
                assert "no tunnel is open" in ssh.out
            strict = openssh(here, "-v", "-N", "-oExitOnForwardFailure=yes", "-R", forward, LOCAL)
            async with client(strict) as ssh:
                assert await ssh.ended() == 255
                assert "remote port forwarding failed" in ssh.err
                await ssh.wait_output(reason)  # with -v also without a session


async def test_a_visitor_of_a_server_that_does_not_accept_is_closed_in_time_and_the_next_one_is_served() -> None:
    with ExitStack() as stack:
        stack.enter_context(trio.fail_after(PATIENCE))
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        port = server.getsockname()[1]
        # It fills the backlog, and is not accepted.
        full = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        async with (
            relay(dial_timeout=0.3) as here,
            client(openssh(here, "-N", "-R", f"0:127.0.0.1:{port}", "127.0.0.1")),
        ):
            (tunnel,) = await here.until_served()
            capacity = tunnel.parked
            assert await is_dropped(await connect(tunnel.client_uri))
            assert tunnel.parked == capacity - 1  # the client is still connecting
            full.close()
            for _ in range(2):  # `full`, and the visitor that was closed
                await trio.lowlevel.wait_readable(server)
                server.accept()[0].close()
            await here.until(lambda: tunnel.parked == capacity)
            visitor = await connect(tunnel.client_uri)
            await trio.lowlevel.wait_readable(server)
            with server.accept()[0] as served:
                served.sendall(b"hello")
                assert await read_exactly(visitor, 5) == b"hello"
                with socket.create_connection(("127.0.0.1", port)):
                    assert await is_dropped(await connect(tunnel.client_uri))  # while this one is connected
                served.sendall(b"still here")
                assert await read_exactly(visitor, 10) == b"still here"


async def test_a_refused_channel_resets_its_visitor_and_nothing_else() -> None:
    with trio.fail_after(PATIENCE):
        async with relay() as here, client(openssh(here, "-N", "-R", f"0:{LOCAL}:{unused_port()}", LOCAL)):
            (tunnel,) = await here.until_served()
            for _ in range(3):
                with suppress(OSError):  # it may be reset before `connect` returns
                    assert await is_dropped(await connect(tunnel.client_uri))
            assert tunnel.parked


# Commands


async def run(here: Relay, *command: str, key: Path | None = None) -> tuple[int, str, str]:
    async with client(openssh(here, LOCAL, *command, key=key)) as ssh:
        status = await ssh.ended()
        return status, ssh.out, ssh.err


async def test_list_and_close_apply_to_the_tunnels_of_the_credential(tmp_path: Path) -> None:
    (mine, line), (theirs, other) = make_key(tmp_path, "mine"), make_key(tmp_path, "theirs")
    me, them = credential("me", authorized_keys=[line]), credential("them", authorized_keys=[other])
    with trio.fail_after(PATIENCE):
        async with (
            relay([me, them]) as here,
            client(openssh(here, "-N", "-R", f"0:{LOCAL}:9", LOCAL, key=mine)),
        ):
            (tunnel,) = await here.until_served()
            status, out, _ = await run(here, "list", key=mine)
            assert (status, out.split()[0]) == (0, tunnel.id)
            assert (await run(here, "list", key=theirs))[1] == "no tunnel is open\n"
            status, _, err = await run(here, "close", tunnel.id, key=theirs)
            assert status == 69
            assert "no open tunnel is called" in err
            assert (await run(here, "close", tunnel.id, key=mine))[:2] == (0, f"closed {tunnel.id}\n")
            await tunnel.wait_closed()


async def test_the_table_of_verbs_checks_the_role_for_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, line = make_key(tmp_path)
    monkeypatch.setitem(COMMANDS, "close", replace(COMMANDS["close"], role=Role.ADMIN))
    with trio.fail_after(PATIENCE):
        async with relay([credential("me", authorized_keys=[line])]) as here:
            tunnel = await here.open()
            status, out, err = await run(here, "close", tunnel.id, key=key)
            assert (status, out) == (NotAllowedError.exit_status, "")
            assert "close requires the role admin" in err
            status, _, err = await run(here, "list", tunnel.id, key=key)
            assert (status, err.splitlines()[-1]) == (UsageError.exit_status, "tunneld: usage: list")
            assert here.tunnel is tunnel


async def test_there_is_no_shell() -> None:
    with trio.fail_after(PATIENCE):
        async with relay() as here:
            status, out, err = await run(here, "cat", "/etc/passwd")
            assert (status, out) == (64, "")
            assert "unknown command 'cat': this relay has no shell" in err
            assert "ssh -R 0:localhost:8000" in (await run(here, "help"))[1]
            async with client(openssh(here, "-s", LOCAL, "sftp")) as sftp:
                assert await sftp.ended() == 255
            async with client(openssh(here, "-W", f"{LOCAL}:{here.port}", LOCAL)) as through:
                assert await through.ended() == 255
                assert "open failed" in through.err
