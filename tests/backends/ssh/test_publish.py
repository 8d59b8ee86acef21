"""A person with nothing but OpenSSH: one command publishes a local server."""

from __future__ import annotations

import socket
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
import trio

from tests.agent.support import echo, local_server, unused_port
from tests.agent.test_expose import ask
from tests.backends.ssh.support import Relay, client, make_key, openssh, relay, visitors_of
from tests.support.credentials import credential
from tests.support.people import PATIENCE, connect, is_dropped, is_refused, read_exactly
from tests.support.system import find_program

LOCAL = "127.0.0.1"


async def test_one_command_without_a_session_prints_the_port_and_works() -> None:
    with trio.fail_after(PATIENCE):
        async with (
            relay() as here,
            local_server(echo) as target,
            client(openssh(here, "-N", "-R", f"0:{LOCAL}:{target.port}", LOCAL)) as ssh,
        ):
            port = await ssh.port()
            assert port == here.tunnel.client_uri.port
            assert await ask(visitors_of(port), b"x" * 300_000) == b"x" * 300_000
            assert here.tunnel.served == 1


async def test_a_session_shows_both_addresses_and_counts_until_ctrl_c() -> None:
    with trio.fail_after(PATIENCE):
        async with relay() as here, local_server(echo) as target:
            command = openssh(here, "-tt", "-R", f"0:{LOCAL}:{target.port}", LOCAL)
            async with client(command) as ssh:
                await ssh.wait_said(r"visitors 0, served 0", "out")
                tunnel = here.tunnel
                assert str(tunnel.client_uri) in ssh.out
                assert str(tunnel.server_uri) in ssh.out
                visitor = await connect(tunnel.client_uri)
                await visitor.send_all(b"hello")
                assert await read_exactly(visitor, 5) == b"hello"
                await ssh.wait_said(r"visitors 1, served 1, up 5 B, down 5 B", "out")
                await ssh.process.stdin.send_all(b"\x03")  # type: ignore[union-attr]
                assert await ssh.ended() == 0
                assert await is_dropped(visitor)
                await tunnel.wait_closed()
                assert tunnel.reason == "its owner has ended it"


async def test_without_a_terminal_the_addresses_are_plain_lines() -> None:
    with trio.fail_after(PATIENCE):
        async with (
            relay() as here,
            local_server(echo) as target,
            client(openssh(here, "-R", f"0:{LOCAL}:{target.port}", LOCAL)) as ssh,
        ):
            await ssh.process.stdin.aclose()  # type: ignore[union-attr]
            await ssh.wait_said(r"hidden server ssh://", "out")
            assert "\r" not in ssh.out
            assert "\x1b" not in ssh.out
            assert await ask(here.tunnel.client_uri, b"still there") == b"still there"


async def test_the_word_qr_draws_the_address() -> None:
    with trio.fail_after(PATIENCE):
        async with (
            relay() as here,
            local_server(echo) as target,
            client(openssh(here, "-R", f"0:{LOCAL}:{target.port}", LOCAL, "qr", "https")) as ssh,
        ):
            await ssh.wait_said(r"https://127.0.0.1:\d+/", "out")
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


async def test_a_port_can_be_asked_for_and_a_forward_be_cancelled(tmp_path: Path) -> None:
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
                assert await is_refused(visitors_of(port))
                await trio.run_process(
                    [find_program("ssh"), "-S", str(control), "-O", "forward", "-R", f"0:{LOCAL}:{target.port}", LOCAL],
                    capture_stdout=True,
                )
                (other,) = await here.until_served()
                assert await ask(other.client_uri, b"again") == b"again"


REFUSED = [
    ("name:80:127.0.0.1:9", r"'name' cannot be had: names are kept for HTTP"),
    ("/tmp/socket:127.0.0.1:9", r"'/tmp/socket' is not listened on"),
]


@pytest.mark.parametrize(("forward", "why"), REFUSED)
async def test_what_cannot_be_had_is_refused_with_a_sentence(forward: str, why: str) -> None:
    with trio.fail_after(PATIENCE):
        async with relay() as here:
            async with client(openssh(here, "-R", forward, LOCAL, "list")) as ssh:
                assert await ssh.ended() == 0
                await ssh.wait_said(why)
                assert "no tunnel is open" in ssh.out
            strict = openssh(here, "-v", "-N", "-oExitOnForwardFailure=yes", "-R", forward, LOCAL)
            async with client(strict) as ssh:
                assert await ssh.ended() == 255
                assert "remote port forwarding failed" in ssh.err
                await ssh.wait_said(why)  # with -v also where there is no session


async def test_a_visitor_of_a_server_that_cannot_be_reached_is_told_in_time_and_the_next_one_is_served() -> None:
    with ExitStack() as stack:
        stack.enter_context(trio.fail_after(PATIENCE))
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        port = server.getsockname()[1]
        # Nobody accepts it, and nobody else gets through.
        full = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        async with (
            relay(dial_timeout=0.3) as here,
            client(openssh(here, "-N", "-R", f"0:127.0.0.1:{port}", "127.0.0.1")),
        ):
            (tunnel,) = await here.until_served()
            room = tunnel.parked
            assert await is_dropped(await connect(tunnel.client_uri))
            assert tunnel.parked == room - 1  # the ssh still tries
            full.close()
            for _ in range(2):  # the one that was full, and the one that came too late
                await trio.lowlevel.wait_readable(server)
                server.accept()[0].close()
            await here.until(lambda: tunnel.parked == room)
            visitor = await connect(tunnel.client_uri)
            await trio.lowlevel.wait_readable(server)
            with server.accept()[0] as served:
                served.sendall(b"hello")
                assert await read_exactly(visitor, 5) == b"hello"
                with socket.create_connection(("127.0.0.1", port)):
                    assert await is_dropped(await connect(tunnel.client_uri))  # after as long as this one is here
                served.sendall(b"still here")
                assert await read_exactly(visitor, 10) == b"still here"


async def test_what_the_hidden_server_refuses_resets_the_visitor_and_nothing_else() -> None:
    with trio.fail_after(PATIENCE):
        async with relay() as here, client(openssh(here, "-N", "-R", f"0:{LOCAL}:{unused_port()}", LOCAL)):
            (tunnel,) = await here.until_served()
            for _ in range(3):
                with suppress(OSError):  # it may be refused before we know that we were connected
                    assert await is_dropped(await connect(tunnel.client_uri))
            assert tunnel.parked


# The words


async def run(here: Relay, *words: str, key: Path | None = None) -> tuple[int, str, str]:
    async with client(openssh(here, LOCAL, *words, key=key)) as ssh:
        status = await ssh.ended()
        return status, ssh.out, ssh.err


async def test_list_and_close_are_about_the_tunnels_of_the_credential(tmp_path: Path) -> None:
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


async def test_there_is_no_shell_behind_the_words() -> None:
    with trio.fail_after(PATIENCE):
        async with relay() as here:
            status, out, err = await run(here, "cat", "/etc/passwd")
            assert (status, out) == (64, "")
            assert "there is no shell" in err
            assert "ssh -R 0:localhost:8000" in (await run(here, "help"))[1]
            async with client(openssh(here, "-s", LOCAL, "sftp")) as sftp:
                assert await sftp.ended() == 255
            async with client(openssh(here, "-W", f"{LOCAL}:{here.port}", LOCAL)) as through:
                assert await through.ended() == 255
                assert "open failed" in through.err
