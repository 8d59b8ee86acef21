"""The relay's SSH host key: generated once, private, kept, and displayed."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import asyncssh
import pytest
import trio

from tests.support.peers import PATIENCE
from tests.support.programs import Daemon, program
from tunneld.backends.ssh.host_key import fingerprint, load_or_make, make, place
from tunneld.config.schema import Settings
from tunneld.errors import ConfigError


def test_a_missing_key_is_generated_once(tmp_path: Path) -> None:
    path, before = tmp_path / "new" / "key", os.umask(0)
    try:
        first = load_or_make(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_or_make(path).export_public_key() == first.export_public_key()
    assert [each.name for each in path.parent.iterdir()] == ["key"]


def test_the_fingerprint_is_the_one_that_ssh_shows(tmp_path: Path, program_path: Callable[[str], str]) -> None:
    path = tmp_path / "key"
    key = load_or_make(path)
    shown = subprocess.run([program_path("ssh-keygen"), "-lf", path], capture_output=True, text=True, check=True).stdout
    assert shown.split()[1] == fingerprint(key) == fingerprint(path.read_bytes())


def test_an_existing_openssh_key_is_used(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_bytes(asyncssh.generate_private_key("ecdsa-sha2-nistp256").export_private_key())
    path.chmod(0o640)  # a group may read it
    assert load_or_make(path).get_algorithm() == "ecdsa-sha2-nistp256"


@pytest.mark.parametrize(
    ("content", "mode", "reason"),
    [
        (make(), 0o644, "is accessible to other users; run: chmod 600"),
        (b"garbage", 0o600, "is not a private key without a passphrase"),
        (
            asyncssh.generate_private_key("ssh-ed25519").export_private_key(passphrase="secret"),
            0o600,
            "is not a private key without a passphrase",
        ),
    ],
)
def test_an_unusable_file_is_reported(tmp_path: Path, content: bytes, mode: int, reason: str) -> None:
    path = tmp_path / "key"
    path.write_bytes(content)
    path.chmod(mode)
    with pytest.raises(ConfigError, match=f"ssh.host_key: {path} {reason}"):
        load_or_make(path)
    assert path.read_bytes() == content


def test_an_unusable_directory_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"ssh\.host_key: .*(file exists|not a directory)"):
        load_or_make(tmp_path / "file" / "key")


def test_the_default_path_is_in_the_state_directory(tmp_path: Path) -> None:
    assert place(Settings.model_validate({"daemon": {"state": tmp_path}})) == tmp_path / "ssh_host_key"
    named = Settings.model_validate({"daemon": {"state": tmp_path}, "ssh": {"host_key": tmp_path / "own"}})
    assert place(named) == tmp_path / "own"


CONFIG = """
[control]
port = 0
[http]
port = 0
[webmux]
port = 0
[tunnels]
ports = "0"
[daemon]
state = "state"
[ssh]
enabled = {enabled}
port = 0
"""


async def test_a_reload_opens_the_port_and_status_shows_the_fingerprint(tmp_path: Path) -> None:
    config = tmp_path / "tunnel.toml"
    config.write_text(CONFIG.format(enabled="false"))
    command = [sys.executable, "-m", "tunneld", "--config", str(config), "--log-format", "json"]
    with trio.fail_after(PATIENCE):
        async with program(command, stderr=subprocess.PIPE) as process, trio.open_nursery() as nursery:
            running = Daemon(process)
            nursery.start_soon(running.listen)
            running.control = (await running.wait_logged("control listens"))["uri"]
            assert "this relay has no port for the ssh backend" in await running.ask("openTunnel ssh")
            assert not (tmp_path / "state" / "ssh_host_key").exists()
            config.write_text(CONFIG.format(enabled="true"))
            assert "OK" in await running.ask("reload")
            await running.wait_logged("ssh listens")
            assert "ssh://" in await running.ask("openTunnel ssh")
            key = asyncssh.read_private_key(tmp_path / "state" / "ssh_host_key")
            assert key.get_fingerprint() in await running.ask("status")
            where = (await running.wait_logged("ssh listens"))["uri"].rpartition(":")[2]
            async with await trio.open_tcp_stream("127.0.0.1", int(where)) as stream:
                assert (await stream.receive_some()).startswith(b"SSH-2.0-tunneld_")
            nursery.cancel_scope.cancel()
