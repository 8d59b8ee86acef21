"""The salts of names without a verifier in the configuration: of secrets kept in files, and of names that do not exist.

A client is told the salt of any name before it has proved anything. So the salt of a name that does not exist must look
like any other, and must not change when the daemon restarts, since the salts of real names do not. It is derived from
the name with a key that is kept in the state folder. Without a state folder the key is lost with the process.
"""

from __future__ import annotations

import hmac
import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any

from tunneld.config.places import state_folder

SALT_BYTES = 16
"""No two of 2^64 random salts of this size are equal."""

KEY_BYTES = 32
"""The output of HMAC-SHA-256."""

KEY_FILE = "salt_key"
"""The name of the key's file in the state folder."""

PROCESS_KEY = secrets.token_bytes(KEY_BYTES)
"""The key of this process, as long as none is stored."""


def derive_salt(key: bytes, name: str, length: int = SALT_BYTES) -> bytes:
    """The salt of a name, `length` bytes, the same whether or not there is such a credential."""
    parts = [f"salt\0{name}\0{part}".encode("utf-8", "surrogatepass") for part in range(-(-length // KEY_BYTES))]
    return b"".join(hmac.digest(key, part, "sha256") for part in parts)[:length]


def read_salt_key(folder: Path | None) -> bytes:
    """The key in the state folder `folder`; the one of this process if none can be read there."""
    try:
        stored = b"" if folder is None else (folder / KEY_FILE).read_bytes()
    except OSError:
        stored = b""
    return stored if len(stored) == KEY_BYTES else PROCESS_KEY


def store_salt_key(folder: Path | None, key: bytes) -> None:
    """Write the key to the state folder, readable by its owner only, unless it is there. A folder that cannot be
    written is no error: the key then lasts as long as the process.
    """
    if folder is None or read_salt_key(folder) == key != PROCESS_KEY:
        return
    new = folder / f".{KEY_FILE}.{os.getpid()}"
    with suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(key)
        new.replace(folder / KEY_FILE)


def state_folder_of(tables: dict[str, Any], folder: Path) -> Path | None:
    """The state folder that the tables of a file in `folder` name, before they are checked; else the default one."""
    daemon = tables.get("daemon")
    named = daemon.get("state") if isinstance(daemon, dict) else None
    return folder / named if isinstance(named, str) and "\0" not in named else state_folder()
