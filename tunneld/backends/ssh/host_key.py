"""The relay's SSH host key: generated once, readable by the daemon's user and group only, and kept.

The key is Ed25519, which every current client supports. If the file is lost, the relay generates a new key, and clients
report a changed host key until their `known_hosts` is updated.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from tunneld.config.places import state_folder
from tunneld.config.schema import Settings
from tunneld.errors import ConfigError, reason_of
from tunneld.tls.private_files import temporary_beside, write_private

if TYPE_CHECKING:
    import asyncssh

KEY_FILE = "ssh_host_key"
"""The name of the file in the state directory."""
KEY_ALGORITHM = "ssh-ed25519"
FORBIDDEN_MODE = 0o037
"""Permissions that a private key must not have. A group may read it: the daemon's, if root owns the file."""


def make() -> bytes:
    """Generate a private key, in OpenSSH's format."""
    import asyncssh  # noqa: PLC0415  # takes half a second, which a relay without an SSH port saves

    return asyncssh.generate_private_key(KEY_ALGORITHM, comment="tunneld").export_private_key()


def place(settings: Settings) -> Path:
    """The path of the key file. Raises `ConfigError` if neither a path nor a state directory is known."""
    if settings.ssh.host_key is not None:
        return settings.ssh.host_key
    folder = settings.daemon.state or state_folder()
    if folder is None:
        raise ConfigError(["ssh.host_key: no state directory to keep the key in; set ssh.host_key or daemon.state"])
    return folder / KEY_FILE


def load_or_make(path: Path) -> asyncssh.SSHKey:
    """The key in the file, which is generated if there is none. Raises `ConfigError`."""
    import asyncssh  # noqa: PLC0415

    try:
        if not path.exists():
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            _write_new(path, make())
        if path.stat().st_mode & FORBIDDEN_MODE:
            raise ConfigError([f"ssh.host_key: {path} is accessible to other users; run: chmod 600 {path}"])
        return asyncssh.import_private_key(path.read_bytes())
    except OSError as error:
        raise ConfigError([f"ssh.host_key: {path}: {reason_of(error)}"]) from None
    except (asyncssh.KeyImportError, asyncssh.KeyEncryptionError) as error:
        raise ConfigError([f"ssh.host_key: {path} is not a private key without a passphrase: {error}"]) from None


def fingerprint(key: bytes | asyncssh.SSHKey) -> str:
    """The fingerprint as `ssh` displays it: `SHA256:...`."""
    import asyncssh  # noqa: PLC0415

    return (asyncssh.import_private_key(key) if isinstance(key, bytes) else key).get_fingerprint("sha256")


def _write_new(path: Path, content: bytes) -> None:
    """Write the file atomically. A file that another process created meanwhile is kept."""
    new = temporary_beside(path)
    try:
        write_private(new, content)
        with suppress(FileExistsError):
            path.hardlink_to(new)
    finally:
        new.unlink(missing_ok=True)
