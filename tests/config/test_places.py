"""The default locations of the configuration file."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunneld.config import find_config, places


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clean system: no variables set, an empty home, /etc/tunneld in a temporary folder."""
    for name in ("TUNNELD_CONFIG", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(places, "SYSTEM_CONFIG", tmp_path / "etc/tunneld/tunnel.toml")
    return tmp_path


def create(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def test_without_a_file_there_is_none(system: Path) -> None:
    assert find_config() is None


def test_the_order_of_the_locations(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    etc = create(system / "etc/tunneld/tunnel.toml")
    assert find_config() == etc
    home = create(system / "home/.config/tunneld/tunnel.toml")
    assert find_config() == home
    xdg = create(system / "xdg/tunneld/tunnel.toml")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(system / "xdg"))
    assert find_config() == xdg
    monkeypatch.setenv("TUNNELD_CONFIG", str(system / "named.toml"))
    assert find_config() == system / "named.toml"  # although it does not exist, so that loading it fails


def test_a_relative_xdg_folder_is_ignored(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(system)
    create(system / "here/tunneld/tunnel.toml")
    monkeypatch.setenv("XDG_CONFIG_HOME", "here")
    assert find_config() is None


def test_a_file_that_cannot_be_read_is_still_found(system: Path) -> None:
    link = system / "etc/tunneld/tunnel.toml"
    link.parent.mkdir(parents=True)
    link.symlink_to(system / "gone.toml")
    assert find_config() == link


def test_a_user_without_a_home_gets_the_system_file(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("could not determine home directory")

    monkeypatch.setattr(Path, "home", homeless)
    etc = create(system / "etc/tunneld/tunnel.toml")
    assert find_config() == etc
