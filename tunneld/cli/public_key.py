"""The public key of an ssh, from its file."""

from __future__ import annotations

from pathlib import Path

from tunneld.config.ssh_keys import check_line
from tunneld.errors import UsageError, reason_of

LARGEST = 64 * 1024
"""Octets: one of RSA with 16384 bits has 3 KiB, and a comment may be long."""


def read_public_key(file: Path) -> str:
    """What is in a file like `id_ed25519.pub`, as a line of authorized_keys. Raises `UsageError`."""
    try:
        with file.open("rb") as opened:
            text = opened.read(LARGEST).decode(errors="replace").strip()
        check_line(text)
    except OSError as error:
        raise UsageError(f"--ssh-key {file}: {reason_of(error)}") from None
    except ValueError as error:
        raise UsageError(f"--ssh-key {file}: {error}") from None
    return text
