"""The keys that this user knows: the own identity, and the ids of other people's, by names of the user's choice.

    ~/.config/tunneld/identity.pem      the private key, see tls/identity.py; mode 0600
    ~/.config/tunneld/trusted           lines `NAME ID`; a # begins a comment

A running agent reads the second file again when it has changed, so a peer that is removed gets in no more.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from tunneld.config.places import user_file
from tunneld.errors import ConfigError, UsageError, reason_of
from tunneld.net.address import Private, parse_private
from tunneld.net.node_id import NodeId
from tunneld.tls.identity import Identity
from tunneld.tls.private_files import sync_folder, temporary_beside, write_private

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
MAX_TRUST_FILE = 1 << 20
"""Bytes; a larger file is the wrong one."""


def identity_path() -> Path:
    """The file of this user's identity. Raises `UsageError` for a user without a home."""
    return _user_path("identity.pem")


def load_identity(path: Path | None = None) -> Identity:
    """The identity in this file, by default this user's. Raises `UsageError` if there is none, and `ConfigError`."""
    path = path or identity_path()
    try:
        return Identity.load(path)
    except FileNotFoundError:
        raise UsageError(f"there is no identity {path}; create one with: tunnel identity create") from None


class TrustedPeers:
    """The file with the ids that this user knows by name."""

    def __init__(self, path: Path | None = None) -> None:
        """`path`: by default that of this user. Raises `UsageError` for a user without a home."""
        self.path = path or _user_path("trusted")
        self._peers: Mapping[str, NodeId] = {}
        self._read_from: tuple[int, int, int] | None = None  # the file that was read last

    def all(self) -> Mapping[str, NodeId]:
        """The ids by name, in the order of the file. Raises `ConfigError`."""
        try:
            about = self.path.stat()
            version = about.st_ino, about.st_mtime_ns, about.st_size
            if version != self._read_from:
                self._peers, self._read_from = self._parse(), version
        except FileNotFoundError:
            self._peers, self._read_from = {}, None
        except OSError as error:
            raise ConfigError([f"could not read {self.path}: {reason_of(error)}"]) from None
        return self._peers

    def find(self, reference: str) -> NodeId:
        """The id with this name, or the id itself. Raises `UsageError` and `ConfigError`."""
        known = self.all()
        if reference in known:
            return known[reference]
        try:
            return NodeId.parse(reference)
        except UsageError:
            raise UsageError(
                f"no peer is known as {reference!r}: ask for the id that `tunnel identity` prints there, and run: "
                f"tunnel trust add {reference} ID"
            ) from None

    def resolve(self, reference: str) -> Private:
        """The address of the private tunnel `NAME@PEER`; the peer is known by name, or given by its id. Raises
        `UsageError` and `ConfigError`.
        """
        name, at, peer = reference.partition("@")
        if not at:
            raise UsageError(f"whose tunnel? write {reference}@PEER, with a name of `tunnel trust list` or an id")
        return parse_private(f"{name}@{self.find(peer)}")

    def name_of(self, node: NodeId) -> str:
        """The name of a peer; empty if it has none."""
        return next((name for name, known in self.all().items() if known == node), "")

    def add(self, name: str, node: NodeId) -> None:
        """Add a peer. Raises `UsageError` where the name has another id already, and OSError."""
        if not NAME.fullmatch(name):
            raise UsageError(f"not a name of at most 64 letters, digits, dots, dashes and underscores: {name!r}")
        known = dict(self.all())
        if known.setdefault(name, node) != node:
            raise UsageError(
                f"{name!r} is {known[name]} already; if the key has changed, first run: tunnel trust remove {name}"
            )
        self._write(known)

    def remove(self, name: str) -> None:
        """Forget a peer. Raises `UsageError` where there is none, and OSError."""
        known = dict(self.all())
        if known.pop(name, None) is None:
            raise UsageError(f"no peer is known as {name!r}; tunnel trust list shows all")
        self._write(known)

    def _parse(self) -> Mapping[str, NodeId]:
        with self.path.open("rb") as file:
            content = file.read(MAX_TRUST_FILE + 1)
        if len(content) > MAX_TRUST_FILE:
            raise ConfigError([f"{self.path} is larger than {MAX_TRUST_FILE} bytes; it is not a list of peers"])
        peers: dict[str, NodeId] = {}
        for number, line in enumerate(content.decode(errors="replace").splitlines(), 1):
            words = line.partition("#")[0].split()
            if not words:
                continue
            try:
                name, node = words
                peers[name] = NodeId.parse(node)
            except (ValueError, UsageError):
                raise ConfigError([f"{self.path}:{number}: not a line of a name and an id: {line.strip()!r}"]) from None
        return peers

    def _write(self, peers: Mapping[str, NodeId]) -> None:
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = temporary_beside(self.path)
        temporary.unlink(missing_ok=True)
        write_private(temporary, "".join(f"{name} {node}\n" for name, node in peers.items()).encode())
        os.replace(temporary, self.path)  # noqa: PTH105 - atomic, as it says
        sync_folder(self.path.parent)
        self._read_from = None


def _user_path(name: str) -> Path:
    path = user_file(name)
    if path is None:
        raise UsageError(f"no folder for the file {name}: set $XDG_CONFIG_HOME or $HOME")
    return path
