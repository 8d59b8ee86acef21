"""Real programs through a private tunnel: alice exposes a server, bob visits, carol is refused."""

from __future__ import annotations

import getpass
import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from tests.agent.support import echo, local_server
from tests.e2e.test_postgres import test_psql_and_pgbench  # noqa: F401  # run here, too, with the fixture below
from tests.e2e.test_ssh import sshd, test_rsync_copies_a_tree_and_then_only_changes  # noqa: F401
from tests.support.exposed import PRIVATE, agent_of, home, make_homes, privately_exposed
from tests.support.peers import read_exactly
from tests.support.programs import daemon, run, tunnel_command
from tunneld.config import make_verifier

MIB = 1 << 20
Find = Callable[[str], str]

SSH = """
Host alice
    ProxyCommand {command}
    HostKeyAlias hidden
    User {user}
    IdentityFile {folder}/me
    IdentitiesOnly yes
    IdentityAgent none
    BatchMode yes
    StrictHostKeyChecking yes
    UserKnownHostsFile {folder}/known
    GlobalKnownHostsFile /dev/null
"""


SECRET = "correct horse battery"


def credential(name: str, secret: str, *lines: str) -> str:
    """A table of the relay's configuration."""
    text = "\n".join([f'name = "{name}"', f'verifier = "{make_verifier(secret)}"', *lines])
    return f"\n[[credential]]\n{text}\n"


@pytest.fixture
def way() -> str:
    """The way of the imported tests."""
    return f"{PRIVATE}webmuxs"


def configure_proxy(folder: Path, command: list[str]) -> str:
    """Write the visitor's configuration, with `tunnel visit -W` as the ProxyCommand."""
    (folder / "known").write_text(f"hidden {(folder / 'host.pub').read_text()}")
    quoted = " ".join(f"'{word}'" for word in command)
    (folder / "ssh_config").write_text(SSH.format(command=quoted, folder=folder, user=getpass.getuser()))
    return f"{folder}/ssh_config"


@pytest.mark.parametrize("backend", ["webmux", "tcp"])
async def test_ssh_by_a_proxy_command(tmp_path: Path, program_path: Find, backend: str) -> None:
    content = hashlib.sha256(b"input").digest() * (4 * MIB // 32)
    await make_homes(tmp_path)
    async with sshd(tmp_path, program_path) as port, daemon(tmp_path) as relay:
        where = ["--relay", relay.control]
        words = ["--private", "--name", "shell", "--admit", "bob", "--backend", backend]
        log = tmp_path / "alice.log"
        with log.open("wb") as stderr:
            async with agent_of(port, *where, *words, env=home(tmp_path, "alice"), stderr=stderr) as (_, address):
                assert str(address).startswith("private://shell@")
                visit = tunnel_command("visit", "-W", "shell@alice", *where)
                ssh = [program_path("ssh"), "-F", configure_proxy(tmp_path, visit), "alice"]
                bob = home(tmp_path, "bob")
                assert await run([*ssh, "sha256sum"], stdin=content, env=bob) == (
                    f"{hashlib.sha256(content).hexdigest()}  -\n"
                )
                done = await trio.run_process(
                    [*ssh, "echo before; exit 3"], capture_stdout=True, capture_stderr=True, check=False, env=bob
                )
                assert (done.stdout, done.returncode) == (b"before\n", 3)
                assert b"end-to-end: yes" in done.stderr
                carol = await trio.run_process(
                    [*ssh, "true"], capture_stderr=True, check=False, env=home(tmp_path, "carol")
                )
                assert carol.returncode == 255
                assert b"shell@alice refused the visit: not admitted" in carol.stderr
        said = log.read_text()
        assert "is bob (" in said
        left = [line for line in said.splitlines() if line.startswith("left ")]
        assert [line.rpartition(": ")[2] for line in left] == ["finished"] * 2
        assert "end-to-end: yes" in said
        assert "to let it in, add --admit" in said


async def test_one_visit_with_a_code(tmp_path: Path) -> None:
    await make_homes(tmp_path)
    async with daemon(tmp_path) as relay, local_server(echo) as target:
        where, alice, guest = ["--relay", relay.control], home(tmp_path, "alice"), home(tmp_path, "guest")
        async with agent_of(str(target), *where, "--private", "--name", "door", env=alice):
            code = (await run(tunnel_command("invite", "door", "--for", "5m", *where), env=alice)).strip()
            visit = tunnel_command("visit", "-W", "--once", code, *where)
            assert await run(visit, stdin=b"hello", env=guest) == "hello"
            again = await trio.run_process(visit, stdin=b"hello", capture_stderr=True, check=False, env=guest)
            assert again.returncode == 77
            assert b"a code is good for one visit" in again.stderr


async def test_a_code_is_enough_for_a_relay_with_credentials(tmp_path: Path) -> None:
    """And nothing else is: without a credential, and with one that may not ask, the relay refuses."""
    await make_homes(tmp_path)
    words = credential("alice", SECRET) + credential("bob", SECRET, 'visit = ["web@*"]')
    async with daemon(tmp_path, words=words) as relay, local_server(echo) as target:
        (tmp_path / "secret").write_text(SECRET)
        (tmp_path / "secret").chmod(0o600)
        where = ["--relay", relay.control]
        as_alice, as_bob = (["--credential", name, "--secret-file", f"{tmp_path}/secret"] for name in ("alice", "bob"))
        alice, bob, guest = (home(tmp_path, name) for name in ("alice", "bob", "guest"))
        exposing = ["--private", "--name", "door", "--admit", "bob"]
        async with agent_of(str(target), *where, *as_alice, *exposing, env=alice):
            code = (await run(tunnel_command("invite", "door", *where, *as_alice), env=alice)).strip()
            assert await run(tunnel_command("visit", "-W", "--once", code, *where), stdin=b"hi", env=guest) == "hi"
            for login, status, reason in ((as_bob, 77, b"may not visit door@"), ([], 77, b"requires authentication")):
                visit = tunnel_command("visit", "-W", "door@alice", *where, *login)
                refused = await trio.run_process(visit, stdin=b"hi", capture_stderr=True, check=False, env=bob)
                assert (refused.returncode, reason in refused.stderr) == (status, True), refused.stderr
            listed = await run(tunnel_command("list", "--json", *where, *as_alice), env=alice)
            assert '"private": "door@' in listed


async def test_a_visit_survives_a_restart_of_the_relay(tmp_path: Path) -> None:
    """Over a tcp tunnel in plain text: the relay has no state of the two ends' TLS, and hands both sockets over."""
    async with local_server(echo) as target, privately_exposed("tcp", tmp_path, str(target)) as server:
        client = await trio.open_tcp_stream(server.address.host, server.address.port)
        async with client:
            await client.send_all(b"before")
            assert await read_exactly(client, 6) == b"before"
            await run(tunnel_command("restart", "--relay", server.relay.control))
            await client.send_all(b"after")
            assert await read_exactly(client, 5) == b"after"
            await client.send_eof()
            assert await client.receive_some() == b""


@pytest.mark.big
@pytest.mark.parametrize("backend", ["tcp", "webmux", "webmuxs"])
async def test_a_gibibyte_in_both_directions(tmp_path: Path, backend: str) -> None:
    piece = hashlib.sha256(b"piece").digest() * (MIB // 32)
    hashes = {name: hashlib.sha256() for name in ("sent", "arrived", "returned")}

    async def serve(stream: trio.SocketStream) -> None:
        async for data in stream:
            hashes["arrived"].update(data)
            await stream.send_all(data)
        await stream.send_eof()

    async def send(client: trio.SocketStream) -> None:
        for number in range(1024):
            changed = number.to_bytes(4, "big") + piece[4:]
            hashes["sent"].update(changed)
            await client.send_all(changed)
        await client.send_eof()

    async with local_server(serve) as target, privately_exposed(backend, tmp_path, str(target)) as server:
        client = await trio.open_tcp_stream(server.address.host, server.address.port)
        async with client, trio.open_nursery() as nursery:
            nursery.start_soon(send, client)
            async for data in client:
                hashes["returned"].update(data)
    assert len({made.hexdigest() for made in hashes.values()}) == 1
