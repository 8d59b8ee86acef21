"""Authentication: by a public key of a credential, a certificate, or the key of an open tunnel."""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path

import pytest
import structlog
import trio

from tests.agent.support import echo, local_server
from tests.agent.test_expose import ask
from tests.backends.ssh.support import Client, Relay, client, make_key, openssh, relay
from tests.support.credentials import credential
from tests.support.peers import PATIENCE
from tests.support.system import find_program, has_ipv6
from tunneld.auth.preauth import KnownSources, PreauthReason
from tunneld.backends.ssh.login import tagged
from tunneld.errors import NotAllowedError

LOCAL = "127.0.0.1"
FORWARD = ["-N", "-R", f"0:{LOCAL}:9"]


async def outcome(here: Relay, *arguments: str, key: Path | None = None, user: str = "user") -> tuple[int, Client]:
    """Run the command `list`; returns its exit status, and the client for its output."""
    async with client(openssh(here, *arguments, LOCAL, "list", key=key, user=user)) as ssh:
        return await ssh.ended(), ssh


async def test_a_key_of_a_credential_opens_tunnels_for_it_and_another_key_is_refused(tmp_path: Path) -> None:
    (key, line), (other_key, _) = make_key(tmp_path), make_key(tmp_path, "other")
    with trio.fail_after(PATIENCE):
        async with (
            relay([credential("me", authorized_keys=[line])]) as here,
            client(openssh(here, *FORWARD, LOCAL, key=key)),
        ):
            (tunnel,) = await here.until_served()
            assert tunnel.spec.owner == "me"
            status, ssh = await outcome(here, key=other_key)
            assert status == 255
            assert "Permission denied (publickey)" in ssh.err


async def test_the_limits_of_a_credential_apply_to_ssh(tmp_path: Path) -> None:
    key, line = make_key(tmp_path)
    me = credential("me", authorized_keys=[line], ports=["20000-20009"], max_tunnels=1, max_visitors=3)
    with trio.fail_after(PATIENCE):
        async with relay([me]) as here:
            _, ssh = await outcome(here, "-R", f"30000:{LOCAL}:9", key=key)
            assert "may not use public port 30000, only 20000-20009" in ssh.err
            async with client(openssh(here, *FORWARD, LOCAL, key=key)):
                (tunnel,) = await here.until_served()
                assert tunnel.limits.max_visitors == 3
                _, ssh = await outcome(here, "-R", f"0:{LOCAL}:9", key=key, user="another")
                assert "(max_tunnels)" in ssh.err


async def test_a_credential_without_the_ssh_backend_opens_no_tunnels(tmp_path: Path) -> None:
    key, line = make_key(tmp_path)
    with trio.fail_after(PATIENCE):
        async with relay([credential("me", authorized_keys=[line], backends=["tcp"])]) as here:
            _, ssh = await outcome(here, "-R", f"0:{LOCAL}:9", key=key)
            assert "may not use the backend 'ssh', only tcp" in ssh.err


async def test_a_key_is_refused_from_outside_the_networks_of_its_credential_or_line(tmp_path: Path) -> None:
    (one, first), (two, second) = make_key(tmp_path, "one"), make_key(tmp_path, "two")
    here_only = credential("a", authorized_keys=[first], networks=["192.0.2.0/24"])
    with trio.fail_after(PATIENCE):
        async with relay([here_only, credential("b", authorized_keys=[f'from="192.0.2.1" {second}'])]) as here:
            assert (await outcome(here, key=one))[0] == 255
            assert (await outcome(here, key=two))[0] == 255


@pytest.mark.skipif(not has_ipv6(), reason="no dual-stack sockets")
async def test_the_networks_of_a_key_hold_on_a_dual_stack_port(tmp_path: Path) -> None:
    (one, first), (two, second) = make_key(tmp_path, "one"), make_key(tmp_path, "two")
    lines = [f'from="127.0.0.0/8" {first}', f'from="!127.0.0.1,*" {second}']
    with trio.fail_after(PATIENCE):
        async with relay([credential("a", authorized_keys=lines)], host="") as here:
            assert (await outcome(here, key=one))[0] == 0
            assert (await outcome(here, key=two))[0] == 255


async def test_a_restricted_key_logs_in_and_does_not_forward(tmp_path: Path) -> None:
    key, line = make_key(tmp_path)
    with trio.fail_after(PATIENCE):
        async with relay([credential("me", authorized_keys=[f"restrict {line}"])]) as here:
            status, ssh = await outcome(here, "-R", f"0:{LOCAL}:9", key=key)
            assert status == 0
            assert "remote port forwarding failed" in ssh.err


def certify(folder: Path, authority: Path, key: Path, principal: str) -> None:
    command = [
        find_program("ssh-keygen"),
        "-q",
        "-s",
        str(authority),
        "-I",
        "me",
        "-n",
        principal,
        str(key.with_suffix(".pub")),
    ]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


async def test_a_certificate_of_an_authority_admits_its_principal(tmp_path: Path) -> None:
    (authority, line), (key, _) = make_key(tmp_path, "ca"), make_key(tmp_path)
    certify(tmp_path, authority, key, "alice")
    with trio.fail_after(PATIENCE):
        async with relay([credential("home", authorized_keys=[f"cert-authority {line}"])]) as here:
            assert (await outcome(here, key=key, user="alice"))[0] == 0
            assert (await outcome(here, key=key, user="bob"))[0] == 255
            assert (await outcome(here, key=authority, user="alice"))[
                0
            ] == 255  # the authority's own key is not a user's


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("ssh-ed25519 AAAA me", 'tunneld-credential="c" ssh-ed25519 AAAA me'),
        ("restrict ssh-ed25519 AAAA", 'tunneld-credential="c",no-port-forwarding ssh-ed25519 AAAA'),
        ("restrict,port-forwarding ssh-ed25519 AAAA", 'tunneld-credential="c" ssh-ed25519 AAAA'),
        ('from="a b",no-pty ssh-rsa AAAA', 'tunneld-credential="c",from="a b",no-pty ssh-rsa AAAA'),
    ],
)
def test_a_line_is_tagged_with_its_credential(line: str, expected: str) -> None:
    assert tagged("c", line) == expected


def test_a_line_cannot_claim_another_credential() -> None:
    assert tagged("mine", 'tunneld-credential="theirs" ssh-ed25519 A') == 'tunneld-credential="mine" ssh-ed25519 A'


# The key of an open tunnel


async def test_the_key_of_an_open_tunnel_is_sufficient(tmp_path: Path) -> None:
    _, line = make_key(tmp_path)
    with trio.fail_after(PATIENCE):
        async with relay([credential("me", authorized_keys=[line])]) as here, local_server(echo) as target:
            tunnel = await here.open()
            assert str(tunnel.server_uri) == f"ssh://{tunnel.server_uri.key}@127.0.0.1:{here.port}"
            command = openssh(here, "-N", "-R", f"0:{LOCAL}:{target.port}", str(tunnel.server_uri))
            del command[command.index("-p") : command.index("-p") + 4]  # the URI has both
            async with client(command) as ssh:
                assert await ssh.port() == tunnel.client_uri.port
                assert await ask(tunnel.client_uri, b"hello") == b"hello"


async def test_a_forward_with_a_tunnels_key_may_request_its_port_and_no_other() -> None:
    with trio.fail_after(PATIENCE):
        async with relay() as here:
            tunnel = await here.open()
            port, user = tunnel.client_uri.port, tunnel.server_uri.key
            wrong = openssh(
                here, "-v", "-N", "-oExitOnForwardFailure=yes", "-R", f"1{port % 1000:04}:x:9", LOCAL, user=user
            )
            async with client(wrong) as ssh:
                assert await ssh.ended() == 255
                await ssh.wait_output(rf"the tunnel of this key has port {port}, not")
            async with client(openssh(here, "-v", "-N", "-R", f"{port}:x:9", "-R", "0:x:8", LOCAL, user=user)) as ssh:
                await here.until_served()
                await ssh.wait_output("can have one -R, and there is one already")


async def test_a_tunnel_served_by_its_key_stays_open_when_its_client_disconnects() -> None:
    with trio.fail_after(PATIENCE):
        async with relay() as here, local_server(echo) as target:
            tunnel = await here.open()
            for _ in range(2):
                forward = openssh(here, "-N", "-R", f"0:{LOCAL}:{target.port}", LOCAL, user=tunnel.server_uri.key)
                async with client(forward):
                    await here.until_served()
                    assert await ask(tunnel.client_uri, b"hello") == b"hello"
                await here.until(lambda: not tunnel.parked)


async def test_a_session_with_a_tunnels_key_shows_the_tunnel_and_leaves_it_open() -> None:
    with trio.fail_after(PATIENCE):
        async with relay() as here:
            tunnel = await here.open()
            command = openssh(here, "-tt", "-R", f"0:{LOCAL}:9", LOCAL, user=tunnel.server_uri.key)
            async with client(command) as ssh:
                await ssh.wait_output("visitors 0, served 0", "out")
                assert str(tunnel.client_uri) in ssh.out
                await ssh.process.stdin.send_all(b"\x03")  # type: ignore[union-attr]
                assert await ssh.ended() == 0
            assert here.tunnel is tunnel


@pytest.mark.parametrize("command", ["list", "close t1"])
@pytest.mark.parametrize("has_credentials", [True, False])
async def test_a_tunnels_key_permits_no_commands(tmp_path: Path, command: str, has_credentials: bool) -> None:
    _, line = make_key(tmp_path)
    credentials = [credential("me", authorized_keys=[line])] if has_credentials else []
    with trio.fail_after(PATIENCE), structlog.testing.capture_logs() as logged:
        async with relay(credentials) as here:
            tunnel = await here.open()
            async with client(openssh(here, LOCAL, command, user=tunnel.server_uri.key)) as ssh:
                assert await ssh.ended() == NotAllowedError.exit_status
                assert "a tunnel's key permits no commands" in ssh.err
                assert ssh.out == ""
            async with client(openssh(here, LOCAL, "help", user=tunnel.server_uri.key)) as ssh:
                assert await ssh.ended() == 0
            assert here.tunnel is tunnel
    assert [line for line in logged if line["log_level"] == "error"] == []


async def test_a_wrong_key_is_penalised(tmp_path: Path) -> None:
    _, line = make_key(tmp_path)
    with trio.fail_after(PATIENCE):
        async with relay([credential("me", authorized_keys=[line])], exempt=False) as here:
            for guess in "ABC":
                assert (await outcome(here, user=24 * guess))[0] == 255
            assert here.preauth.penalty("127.0.0.1", trio.current_time()) > 0
            assert (await outcome(here, user="AAAAAAAAAAAAAAAAAAAAAAAA"))[0] == 255
            assert here.preauth.refusals[PreauthReason.PENALTY] == 1


async def test_an_address_is_known_until_a_day_after_its_last_connection_ended(tmp_path: Path) -> None:
    key, line = make_key(tmp_path)
    with trio.fail_after(PATIENCE):
        async with relay([credential("me", authorized_keys=[line])], exempt=False) as here:
            async with client(openssh(here, *FORWARD, LOCAL, key=key)):
                await here.until_served()
                here.preauth._known = KnownSources(lambda: here.control.known_address_time)  # a day has passed
            await here.until(lambda: len(here.preauth._known) == 1)


async def test_without_credentials_a_remote_client_needs_a_tunnels_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tunneld.backends.ssh.login.is_loopback", lambda host: False)  # as for a remote client
    with trio.fail_after(PATIENCE):
        async with relay() as here:
            assert (await outcome(here))[0] == 255
            tunnel = await here.open()
            async with client(openssh(here, *FORWARD, LOCAL, user=tunnel.server_uri.key)):
                await here.until_served()


async def test_a_client_behind_a_proxy_on_this_machine_is_a_remote_one() -> None:
    """It comes by the HTTPS port, with its address in a PROXY header."""
    with trio.fail_after(PATIENCE):
        async with relay(exempt=False) as here, trio.open_nursery() as nursery:
            (front,) = await trio.open_tcp_listeners(0, host=LOCAL)

            async def pass_on(stream: trio.SocketStream) -> None:
                assert here.listener.deliver(socket.socket(fileno=stream.socket.detach()), ("198.51.100.9", 4711))

            nursery.start_soon(trio.serve_listeners, pass_on, [front])
            command = openssh(front.socket.getsockname()[1], LOCAL, "list")
            with structlog.testing.capture_logs() as logs:
                async with client(command) as ssh:
                    assert await ssh.ended() == 255
            assert [one["peer"] for one in logs if one["event"] == "authentication failed"] == ["198.51.100.9"]
            nursery.cancel_scope.cancel()


async def test_a_removed_credential_forwards_nothing_more(tmp_path: Path) -> None:
    (key, line), control = make_key(tmp_path), tmp_path / "c"
    with trio.fail_after(PATIENCE):
        async with (
            relay([credential("me", authorized_keys=[line])]) as here,
            client(openssh(here, "-v", "-M", "-S", control, "-N", LOCAL, key=key)) as ssh,
        ):
            await ssh.wait_output("Entering interactive session")
            here.credentials = (credential("other"),)
            command = [find_program("ssh"), "-S", str(control), "-O", "forward", "-R", f"0:{LOCAL}:9", LOCAL]
            await trio.run_process(command, check=False, capture_stdout=True, capture_stderr=True)
            await ssh.wait_output("the credential was removed")
