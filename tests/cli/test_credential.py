"""`tunnel credential` on the relay's machine: the file, its mode, and the reload of the relay."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import asyncssh
import pytest
import trio

from tests.cli.test_init import KEPT, made, relay_of
from tests.support.peers import PATIENCE
from tests.support.programs import tunnel_command
from tunneld.cli.tunneld import PORTS
from tunneld.config import load
from tunneld.net.endpoint import CONTROL_PORT
from tunneld.wire.verifier import matches

Captured = pytest.CaptureFixture[str]


async def tunnel(*arguments: str | Path, secret: str = "") -> tuple[int, str, str]:
    environment = KEPT | ({"TUNNEL_SECRET": secret} if secret else {})
    done = await trio.run_process(
        tunnel_command(*map(str, arguments)), env=environment, check=False, capture_stdout=True, capture_stderr=True
    )
    assert b"Traceback" not in done.stderr
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.fixture
def config(tmp_path: Path, capsys: Captured) -> Path:
    """The configuration that `tunneld init` writes, with port 0."""
    made(tmp_path, capsys)
    path = tmp_path / "tunnel.toml"
    text = path.read_text().replace(f"port = {CONTROL_PORT}", "port = 0").replace(PORTS, "0")
    path.write_text(text.replace("[http]", "[http]\nport = 0"))
    return path


def proofs(path: Path) -> dict[str, str]:
    return {one.name: one.verifier.reveal() for one in load(path).credential if one.verifier}


async def test_add_rotate_remove_change_the_file_and_print_the_secret_once(config: Path) -> None:
    with trio.fail_after(PATIENCE):
        before = config.read_text()  # noqa: ASYNC240
        limits = ("--max-tunnels", "3", "--ports", "8000", "--ports", "9000-9009", "--networks", "192.0.2.0/24")
        status, secret, said = await tunnel("credential", "add", "bob", "--config", config, *limits)
        assert (status, secret.count("\n")) == (0, 1)
        assert "SIGHUP" in said
        line = next(line for line in said.splitlines() if line.startswith("    TUNNEL_SECRET_FILE=FILE tunnel expose"))
        assert line.split()[4:7] == ["--relay", "tls://127.0.0.1:0", "--credential"]
        assert "--pin sha256:" in line
        assert config.read_text().startswith(before)  # noqa: ASYNC240
        assert secret.strip() not in config.read_text() + said  # noqa: ASYNC240
        assert " --host " not in line
        bob = load(config).credential[1]
        assert (bob.name, bob.role, bob.max_tunnels, bob.ports) == ("bob", "user", 3, ("8000", "9000-9009"))
        assert bob.proof is not None
        assert matches(bob.proof, secret.strip())
        status, other, _ = await tunnel("credential", "rotate", "bob", "--config", config)
        rotated = load(config).credential[1]
        assert rotated.proof is not None
        assert matches(rotated.proof, other.strip())
        assert rotated.model_dump(exclude={"verifier"}) == bob.model_dump(exclude={"verifier"})
        assert (await tunnel("credential", "remove", "bob", "--config", config))[:2] == (0, "")
        assert config.read_text().rstrip() == before.rstrip()  # noqa: ASYNC240


async def test_set_changes_limits_and_keys_and_nothing_else(config: Path, tmp_path: Path) -> None:
    key = tmp_path / "id.pub"
    key.write_text(asyncssh.generate_private_key("ssh-ed25519").export_public_key().decode())
    with trio.fail_after(PATIENCE):
        old = load(config).credential[0]
        changes = ("--max-tunnels", "3", "--unset", "max_total_visitors", "--ports", "8000", "--ssh-key", key)
        status, printed, _ = await tunnel("credential", "set", "agent", "--config", config, *changes)
        assert (status, printed) == (0, "")
        new = load(config).credential[0]
        assert (new.max_tunnels, new.max_total_visitors, new.ports) == (3, None, ("8000",))
        assert len(new.authorized_keys or ()) == 1
        changed = {"max_tunnels", "max_total_visitors", "ports", "authorized_keys"}
        assert new.model_dump(exclude=changed) == old.model_dump(exclude=changed)
        assert (await tunnel("credential", "set", "agent", "--config", config, "--ssh-key", key))[0] == 0
        assert len(load(config).credential[0].authorized_keys or ()) == 2


async def test_the_mode_of_the_file_and_a_symbolic_link_are_kept(config: Path, tmp_path: Path) -> None:
    with trio.fail_after(PATIENCE):
        link = tmp_path / "link.toml"
        link.symlink_to(config)
        config.chmod(0o640)  # noqa: ASYNC240
        assert (await tunnel("credential", "add", "bob", "--config", link))[0] == 0
        assert link.is_symlink()
        assert stat.S_IMODE(config.stat().st_mode) == 0o640  # noqa: ASYNC240
        assert set(proofs(config)) == {"agent", "bob"}
        assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == []  # noqa: ASYNC240


async def test_list_shows_no_verifier(config: Path) -> None:
    with trio.fail_after(PATIENCE):
        status, shown, _ = await tunnel("credential", "list", "--config", config)
        assert (status, shown) == (0, "agent\tuser\tverifier\tmax_tunnels=20 max_total_visitors=2000\n")
        status, shown, _ = await tunnel("credential", "list", "--config", config, "--json")
        assert json.loads(shown) == {
            "name": "agent", "role": "user", "proof": ["verifier"], "max_tunnels": 20, "max_total_visitors": 2000,
        }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["add", "agent"], 64, "credential 'agent' already exists"),
        (["add", "a b"], 78, "would be invalid: credential[1].name"),
        (["add", "bob", "--ports", "x"], 78, "is not a port range"),
        (["remove", "bob"], 64, "no credential 'bob'"),
        (["remove", "agent"], 78, "lets anyone open tunnels"),
        (["set", "bob", "--max-tunnels", "1"], 64, "no credential 'bob'"),
        (["set", "agent"], 64, "nothing to change"),
        (["set", "agent", "--unset", "quota"], 64, "credential 'agent' has no quota"),
        (["rotate", "bob"], 64, "no credential 'bob'"),
        (["rotate", "agent", "--credential", "admin"], 64, "no secret for the credential 'admin'"),
    ],
)
async def test_an_invalid_change_leaves_the_file_unchanged(
    config: Path, arguments: list[str], status: int, says: str
) -> None:
    with trio.fail_after(PATIENCE):
        before = config.read_bytes()  # noqa: ASYNC240
        done = await tunnel("credential", *arguments, "--config", config)
        assert done[:2] == (status, "")
        assert says in done[2]
        assert config.read_bytes() == before  # noqa: ASYNC240


async def test_an_admin_credential_reloads_the_running_relay(config: Path) -> None:
    with trio.fail_after(2 * PATIENCE):
        _, boss, _ = await tunnel("credential", "add", "boss", "--role", "admin", "--config", config)
        async with relay_of(config) as relay:
            edit = config.read_text().replace("port = 0 ", f"port = {relay.control_port} ", 1)  # noqa: ASYNC240
            config.write_text(edit)  # noqa: ASYNC240 - as it would say, were the port not any
            as_boss = ("--config", config, "--credential", "boss")
            status, secret, said = await tunnel("credential", "add", "bob", *as_boss, secret=boss.strip())
            assert (status, "reloaded the relay" in said) == (0, True)
            there = ("--relay", f"127.0.0.1:{relay.control_port}", "--insecure", "--credential")
            assert (await tunnel("list", *there, "bob", secret=secret.strip()))[0] == 0
            assert (await tunnel("credential", "remove", "bob", *as_boss, secret=boss.strip()))[0] == 0
            assert (await tunnel("list", *there, "bob", secret=secret.strip()))[0] == 77
            wrong = await tunnel("credential", "add", "carol", *as_boss, secret="not the secret")
            assert (wrong[0], "not reloaded, so the old configuration is still in force" in wrong[2]) == (77, True)
        stopped = await tunnel("credential", "add", "dave", *as_boss, secret=boss.strip())
        assert (stopped[0], "the relay will read the new file when it starts" in stopped[2]) == (0, True)


@pytest.mark.parametrize(("names", "host"), [(["alice-*", "blog"], "blog"), (["alice-*"], "any")])
async def test_the_printed_command_has_a_host_name_of_the_credential(config: Path, names: list[str], host: str) -> None:
    words = [word for name in names for word in ("--names", name)]
    _status, _secret, said = await tunnel("credential", "add", "alice", "--config", config, *words)
    assert f"tunnel expose 8000 --host {host} --relay" in said
