"""The passwords for visitors of a host name: `--auth USER:PASSWORD` and `--auth-file FILE`."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from tunneld.errors import UsageError, reason_of
from tunneld.policy.logins import SALT_BYTES, derive_auth

MAX_FILE = 64 * 1024
"""Largest size in bytes of a file with passwords; a larger one is the wrong file."""

_RANDOM_SALT = secrets.token_bytes(SALT_BYTES)
"""For tunnels without a name: the same as long as this process runs, so that it asks for the same when it connects
again.
"""


def auth_option(given: Sequence[str], file: Path | None, tunnel: str) -> str:
    """The value of the option `auth` for passwords that are `given` or in a file; empty if there are none. The relay
    gets verifiers, never a password. Raises `UsageError`.
    """
    logins = [*given, *(_read(file) if file is not None else ())]
    return _derived(tuple(logins), tunnel) if logins else ""


@lru_cache(maxsize=64)  # a file of exposures is looked at more than once, and a verifier takes a tenth of a second
def _derived(logins: tuple[str, ...], tunnel: str) -> str:
    return derive_auth(logins, tunnel, _RANDOM_SALT)


def _read(path: Path) -> list[str]:
    """One `USER:PASSWORD` per line; empty lines and lines with `#` at the start are skipped. Raises `UsageError`."""
    try:
        with path.open("rb") as file:
            mode, content = os.fstat(file.fileno()).st_mode, file.read(MAX_FILE + 1)
    except OSError as error:
        raise UsageError(f"could not read the file with passwords {path}: {reason_of(error)}") from None
    if stat.S_ISREG(mode) and mode & stat.S_IROTH:
        raise UsageError(f"every user of this machine can read the file with passwords {path}; run chmod o-rwx on it")
    lines = [line.strip() for line in content.decode(errors="replace").splitlines()]
    logins = [line for line in lines if line and not line.startswith("#")]
    if not logins or len(content) > MAX_FILE:
        raise UsageError(f"the file {path} must have lines USER:PASSWORD, and at most {MAX_FILE} bytes")
    return logins
