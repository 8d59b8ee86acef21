"""Where the configuration is looked for when none is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunneld.config import find_config, places


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of its own: nothing set, an empty home, /etc/tunneld in a temporary folder."""
    for name in ("TUNNELD_CONFIG", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(places, "SYSTEM_CONFIG", tmp_path / "etc/tunneld/tunnel.toml")
    return tmp_path


def made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def test_nowhere_means_the_defaults(system: Path) -> None:
    assert find_config() is None


def test_one_place_comes_before_the_other(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    etc = made(system / "etc/tunneld/tunnel.toml")
    assert find_config() == etc
    home = made(system / "home/.config/tunneld/tunnel.toml")
    assert find_config() == home
    xdg = made(system / "xdg/tunneld/tunnel.toml")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(system / "xdg"))
    assert find_config() == xdg
    monkeypatch.setenv("TUNNELD_CONFIG", str(system / "named.toml"))
    assert find_config() == system / "named.toml"  # though it is not there: who set it shall hear that


def test_a_relative_xdg_folder_is_ignored(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(system)
    made(system / "here/tunneld/tunnel.toml")
    monkeypatch.setenv("XDG_CONFIG_HOME", "here")
    assert find_config() is None


def test_a_file_that_is_there_but_cannot_be_read_is_the_one(system: Path) -> None:
    link = system / "etc/tunneld/tunnel.toml"
    link.parent.mkdir(parents=True)
    link.symlink_to(system / "gone.toml")
    assert find_config() == link


def test_a_user_without_a_home_has_the_systems_file(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("could not determine home directory")

    monkeypatch.setattr(Path, "home", homeless)
    etc = made(system / "etc/tunneld/tunnel.toml")
    assert find_config() == etc
