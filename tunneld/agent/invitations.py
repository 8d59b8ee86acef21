"""Invitations to private tunnels: files that `tunnel invite` writes, and that the running agent of the same user finds.

    STATE/invitations/ID          the one-time key of this agent; ID is that of the visitor's one-time key

Removing the file is what uses an invitation up, so of two visitors with one code only the first gets in.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tunneld.config.places import state_folder
from tunneld.errors import UsageError
from tunneld.net.node_id import NodeId
from tunneld.tls.identity import MAX_SEED, Identity
from tunneld.tls.one_time import OneTimeCode
from tunneld.tls.private_files import sync_folder, temporary_beside, write_private

MAX_INVITATIONS = 1000
"""Files in the folder; more is a mistake of a script."""
MAX_FILE = 1024
"""Bytes of one; ours have about 200."""


@dataclass(frozen=True, slots=True)
class Invitation:
    """One visitor without a key may enter a tunnel, until a time in seconds since 1970."""

    tunnel: str
    host: Identity  # the key that this agent shows
    expires: float


class Invitations:
    """The invitations of this user on this machine."""

    def __init__(self, folder: Path | None = None) -> None:
        """`folder`: by default below the state folder. Raises `UsageError` for a user without one."""
        state = state_folder()
        if folder is None and state is None:
            raise UsageError("no folder for invitations: set $XDG_STATE_HOME or $HOME")
        self._folder = folder or Path(state or "") / "invitations"

    def add(self, tunnel: str, code: OneTimeCode, seconds: float) -> None:
        """Let in one visitor that knows `code`, within this time. Raises `UsageError` where there are too many, and
        OSError.
        """
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if len(list(self._prune())) >= MAX_INVITATIONS:
            raise UsageError(f"{MAX_INVITATIONS} invitations have not expired yet; remove some from {self._folder}")
        path = self._folder / str(code.visitor.id)
        temporary = temporary_beside(path)
        temporary.unlink(missing_ok=True)
        content = {"tunnel": tunnel, "seed": code.host_seed.hex(), "expires": time.time() + seconds}
        write_private(temporary, json.dumps(content).encode())
        temporary.rename(path)
        sync_folder(self._folder)

    def find(self, visitor: NodeId, tunnel: str) -> Invitation | None:
        """The invitation to this tunnel for the visitor with this one-time key, unless it is used up or has expired."""
        found = _read(self._folder / str(visitor))
        return found if found is not None and found.tunnel == tunnel and found.expires > time.time() else None

    def use_up(self, visitor: NodeId) -> bool:
        """The visitor has proved that it holds the key. False: another one was faster."""
        try:
            (self._folder / str(visitor)).unlink()
        except OSError:
            return False
        return True

    def _prune(self) -> Iterator[Path]:
        """Remove the ones that have expired; yields the others."""
        for path in self._folder.iterdir():
            found = _read(path)
            if found is None or found.expires <= time.time():
                path.unlink(missing_ok=True)
            else:
                yield path


def _read(path: Path) -> Invitation | None:
    """The invitation in a file; None if there is none, or it is damaged."""
    try:
        with path.open("rb") as file:
            content = json.loads(file.read(MAX_FILE))
        seed = bytes.fromhex(content["seed"])
        if len(seed) != MAX_SEED:
            return None
        return Invitation(str(content["tunnel"]), Identity.from_seed(seed), float(content["expires"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
