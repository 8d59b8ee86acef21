"""Files with private keys: readable by this user only, and complete or absent, even after a crash."""

from __future__ import annotations

import os
from pathlib import Path


def write_private(path: Path, content: bytes, *, like: os.stat_result | None = None) -> None:
    """Create a file that only this user can read, or with the owner and the mode of another file that it will replace.
    It is on disk when this returns. Raises OSError, also if the file exists.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        if like is not None:
            os.fchown(file.fileno(), like.st_uid, like.st_gid)
            os.fchmod(file.fileno(), like.st_mode & 0o7777)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def temporary_beside(path: Path) -> Path:
    """The path of a hidden file of this process in the same folder, to be renamed to `path`."""
    return path.with_name(f".{path.name}.{os.getpid()}")


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a crash of the machine. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
