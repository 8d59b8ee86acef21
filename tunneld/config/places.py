"""The default locations of the configuration file and the state folder."""

from __future__ import annotations

import os
from pathlib import Path

SYSTEM_CONFIG = Path("/etc/tunneld/tunnel.toml")
SYSTEM_STATE = Path("/var/lib/tunneld")


def find_config() -> Path | None:
    """The configuration file to use when none is given: the first that exists, or None for the built-in defaults.

    1. `$TUNNELD_CONFIG`, even if it does not exist, because it was set on purpose;
    2. `${XDG_CONFIG_HOME:-~/.config}/tunneld/tunnel.toml`;
    3. `/etc/tunneld/tunnel.toml`.

    A file that exists but cannot be read is still returned: falling back to the defaults would be a surprise.
    """
    if named := os.environ.get("TUNNELD_CONFIG"):
        return Path(named)
    return next((path for path in (_user_config(), SYSTEM_CONFIG) if path is not None and _exists(path)), None)


def default_config() -> Path:
    """The path for a new configuration file, where `find_config` finds it; for root, the system's."""
    if named := os.environ.get("TUNNELD_CONFIG"):
        return Path(named)
    user = None if os.geteuid() == 0 else _user_config()
    return user or SYSTEM_CONFIG


def _user_config() -> Path | None:
    return user_file("tunnel.toml")


def user_file(name: str) -> Path | None:
    """The path of a file of this user: `${XDG_CONFIG_HOME:-~/.config}/tunneld/NAME`; None for a user without a home."""
    folder = Path(os.environ.get("XDG_CONFIG_HOME", ""))
    if not folder.is_absolute():  # the XDG specification says to ignore a relative path
        try:
            folder = Path.home() / ".config"
        except RuntimeError:  # a user without a home, as is common for daemons
            return None
    return folder / "tunneld" / name


def state_folder() -> Path | None:
    """The default folder for state that must survive a restart; None for a user without a home.

    1. the first of `$STATE_DIRECTORY`, which systemd sets if the unit has `StateDirectory=`;
    2. `$XDG_STATE_HOME/tunneld`;
    3. `/var/lib/tunneld` for root, `~/.local/state/tunneld` for any other user.
    """
    for folder in (os.environ.get("STATE_DIRECTORY", "").partition(":")[0], _below(os.environ.get("XDG_STATE_HOME"))):
        if Path(folder).is_absolute():
            return Path(folder)
    if os.geteuid() == 0:
        return SYSTEM_STATE
    try:
        return Path.home() / ".local" / "state" / "tunneld"
    except RuntimeError:  # a user without a home
        return None


def _below(folder: str | None) -> str:
    return f"{folder}/tunneld" if folder else ""


def _exists(path: Path) -> bool:
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True
