"""Files of the configuration that other users can change: refused, or reported."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.pki import Pki
from tunneld.config import load
from tunneld.config.permissions import config_files, writable_by_group
from tunneld.errors import ConfigError

CONTENT = """\
[control.tls]
certificate = "relay.pem"
key = "relay.key"
client_ca = "ca.pem"
[ssh]
host_key = "host_key"
[[credential]]
name = "alice"
secret_file = "secret"
"""
FILES = {
    "tunnel.toml": "--config",
    "relay.pem": "control.tls.certificate",
    "relay.key": "control.tls.key",
    "ca.pem": "control.tls.client_ca",
    "secret": "credential.alice.secret_file",
    "host_key": "ssh.host_key",
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    Pki.issue(tmp_path)
    (tmp_path / "secret").write_text("a secret of more than twenty characters\n")
    (tmp_path / "host_key").touch()
    (tmp_path / "tunnel.toml").write_text(CONTENT)
    for name in FILES:
        (tmp_path / name).chmod(0o644)
    return tmp_path / "tunnel.toml"


@pytest.mark.parametrize(("name", "key"), FILES.items())
def test_a_file_that_every_user_can_change_is_refused(config: Path, name: str, key: str) -> None:
    file = config.with_name(name)
    file.chmod(0o646)
    with pytest.raises(ConfigError) as refused:
        load(config)
    assert refused.value.problems == [
        f"{config}: {key}: every user of this machine can change {file}; run chmod o-w on it"
    ]


@pytest.mark.parametrize(("name", "key"), FILES.items())
def test_a_file_that_its_group_can_change_is_reported(config: Path, name: str, key: str) -> None:
    file = config.with_name(name)
    file.chmod(0o664)
    assert writable_by_group(load(config), config) == [
        f"{key}: the members of its group can change {file}; run chmod g-w on it unless that is intended"
    ]


def test_the_target_of_a_link_counts_and_a_file_that_is_only_readable_is_fine(config: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.toml"
    link.symlink_to(config)
    assert writable_by_group(load(link), link) == []
    config.chmod(0o602)
    with pytest.raises(ConfigError, match=r"--config: every user of this machine can change .*link\.toml"):
        load(link)


def test_files_are_listed_by_their_keys(config: Path) -> None:
    assert {key: path.name for key, path in config_files(load(config), config)} == {
        key: name for name, key in FILES.items() if key != "ssh.host_key"
    }
