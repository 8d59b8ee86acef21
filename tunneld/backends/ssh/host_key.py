"""The key by which the relay is known to ssh: made once, for the eyes of this user only, and kept.

Ed25519, which every client of this decade takes. Who has lost the file makes a new one, and every `known_hosts` says
so.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from tunneld.config.places import state_folder
from tunneld.config.schema import Settings
from tunneld.errors import ConfigError, reason_of

if TYPE_CHECKING:
    import asyncssh

NAME = "ssh_host_key"
ALGORITHM = "ssh-ed25519"
LOOSE = 0o037
"""Permissions that may not be on a private key. A group may read it: the daemon's, where root owns the file."""


def make() -> bytes:
    """A new private key, in OpenSSH's format."""
    import asyncssh  # noqa: PLC0415  # half a second, for those who have no SSH port

    return asyncssh.generate_private_key(ALGORITHM, comment="tunneld").export_private_key()


def place(settings: Settings) -> Path:
    """The file that it is in. Raises `ConfigError` where there is no place for one."""
    if settings.ssh.host_key is not None:
        return settings.ssh.host_key
    folder = settings.daemon.state or state_folder()
    if folder is None:
        raise ConfigError(["ssh.host_key: there is no folder for a key that stays; say where it is to be"])
    return folder / NAME


def load_or_make(path: Path) -> asyncssh.SSHKey:
    """The key in the file, which is made where there is none. Raises `ConfigError`."""
    import asyncssh  # noqa: PLC0415

    try:
        if not path.exists():
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            _write_new(path, make())
        if path.stat().st_mode & LOOSE:
            raise ConfigError([f"ssh.host_key: {path} can be read by others; say: chmod 600 {path}"])
        return asyncssh.import_private_key(path.read_bytes())
    except OSError as error:
        raise ConfigError([f"ssh.host_key: {path}: {reason_of(error)}"]) from None
    except (asyncssh.KeyImportError, asyncssh.KeyEncryptionError) as error:
        raise ConfigError([f"ssh.host_key: {path} is no private key without a passphrase: {error}"]) from None


def fingerprint(key: bytes | asyncssh.SSHKey) -> str:
    """As `ssh` shows it: `SHA256:...`."""
    import asyncssh  # noqa: PLC0415

    return (asyncssh.import_private_key(key) if isinstance(key, bytes) else key).get_fingerprint("sha256")


def _write_new(path: Path, content: bytes) -> None:
    """Whole or not at all, and never in the place of another that came first."""
    new = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileExistsError):
            os.link(new, path)
    finally:
        new.unlink()
