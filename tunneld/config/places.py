"""The usual places of the files that nobody named."""

from __future__ import annotations

import os
from pathlib import Path

SYSTEM_CONFIG = Path("/etc/tunneld/tunnel.toml")
SYSTEM_STATE = Path("/var/lib/tunneld")


def find_config() -> Path | None:
    """The configuration file to use when none is named: the first that is there, or None for the built-in defaults.

    1. `$TUNNELD_CONFIG`, there or not: who sets it means it;
    2. `${XDG_CONFIG_HOME:-~/.config}/tunneld/tunnel.toml`;
    3. `/etc/tunneld/tunnel.toml`.

    A file that is there but cannot be read is still the one: running on defaults instead would be a surprise.
    """
    if named := os.environ.get("TUNNELD_CONFIG"):
        return Path(named)
    return next((path for path in (_user_config(), SYSTEM_CONFIG) if path is not None and _is_there(path)), None)


def default_config() -> Path:
    """Where a new configuration file belongs, so that `find_config` finds it: root's is the system's."""
    if named := os.environ.get("TUNNELD_CONFIG"):
        return Path(named)
    user = None if os.geteuid() == 0 else _user_config()
    return user or SYSTEM_CONFIG


def _user_config() -> Path | None:
    return user_file("tunnel.toml")


def user_file(name: str) -> Path | None:
    """Where a file of ours belongs that is this user's alone: `${XDG_CONFIG_HOME:-~/.config}/tunneld/NAME`."""
    folder = Path(os.environ.get("XDG_CONFIG_HOME", ""))
    if not folder.is_absolute():  # the specification: a relative path there is to be ignored
        try:
            folder = Path.home() / ".config"
        except RuntimeError:  # a user without a home, as daemons often are
            return None
    return folder / "tunneld" / name


def state_folder() -> Path | None:
    """The folder for what must survive a restart, where none is configured; None where there is no place for one.

    1. the first of `$STATE_DIRECTORY`, which systemd sets where the unit has `StateDirectory=`;
    2. `$XDG_STATE_HOME/tunneld`;
    3. `/var/lib/tunneld` for root, `~/.local/state/tunneld` for anybody else.
    """
    for folder in (os.environ.get("STATE_DIRECTORY", "").partition(":")[0], _below(os.environ.get("XDG_STATE_HOME"))):
        if Path(folder).is_absolute():
            return Path(folder)
    if os.geteuid() == 0:
        return SYSTEM_STATE
    try:
        return Path.home() / ".local" / "state" / "tunneld"
    except RuntimeError:  # as above
        return None


def _below(folder: str | None) -> str:
    return f"{folder}/tunneld" if folder else ""


def _is_there(path: Path) -> bool:
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True
