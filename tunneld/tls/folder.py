"""The folder of certificates that were obtained automatically: one file each, with its key and its chain.

A renewal is a single rename, so that a crash leaves the old pair or the new one. The names and dates of all files are
also in an index, since reading a certificate takes two milliseconds, and a relay may have ten thousand. The index is a
cache: an entry counts only while its file is the one that was read, and a lost index costs time.
"""

from __future__ import annotations

import json
import os
import re
import ssl
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from tunneld.errors import ConfigError, reason_of
from tunneld.log import Logger
from tunneld.tls.certificate import ServerCertificate
from tunneld.tls.private_files import sync_folder, temporary_beside, write_private

log = Logger("tls")

SUFFIX = ".pem"
INDEX = ".index.json"
INDEX_EVERY = 64
"""Certificates after which the index is written again: the next start reads at most so many, which takes 0.1 s."""

_FILE_NAME = re.compile(r"(?:\*\.)?[a-z0-9_](?:[a-z0-9._-]*[a-z0-9_])?")
"""Names that can be a file name, a `*.` apart."""


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A certificate in the folder: its key and its chain in one file. Implements `CertificateFiles`.

    `stamp` is when the file was changed, and its size: another file with this name is another certificate.
    """

    certificate: Path
    stamp: tuple[int, int] = (0, 0)
    client_ca: Path | None = None

    @property
    def key(self) -> Path:
        """The same file."""
        return self.certificate


class CertificateFolder:
    """See the description of this module. `write` and `remove` may be called in any thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._index: dict[str, ServerCertificate] | None = None  # by file name; None: not read yet
        self._stale = 0  # entries that the index on the disk lacks
        self._lock = threading.Lock()

    def read(self, in_use: Mapping[Path, ServerCertificate]) -> list[ServerCertificate]:
        """All certificates. A file that cannot be loaded is logged; if it is `in_use`, its former certificate is
        returned.
        """
        with self._lock:
            former = self._index if self._index is not None else self._read_index()
            self._index, found = {}, []
            for file in self._files():
                name = file.certificate.name
                known = former.get(name)
                if known is not None and known.files == file:
                    self._index[name] = known
                    found.append(known)
                    continue
                try:
                    certificate, _ = ServerCertificate.read(file)
                except ConfigError as error:
                    log.warning("could not load a stored certificate", file=str(file.certificate), reason=str(error))
                    if file.certificate in in_use:
                        found.append(in_use[file.certificate])
                    continue
                self._enter(certificate)
                found.append(certificate)
            if self._stale or former.keys() != self._index.keys():
                self._write_index()
        return found

    def write(self, chain: bytes, key: bytes) -> tuple[ServerCertificate, ssl.SSLContext]:
        """Store a certificate and its private key, both in PEM. It replaces the certificate with the same first name.

        The file has mode 0600 and is on disk when this returns. Raises `ConfigError` if the two do not belong together
        or cannot be written; then nothing has changed.
        """
        new = temporary_beside(self.path / "new")
        with self._lock:
            try:
                self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
                new.unlink(missing_ok=True)  # of a process that crashed
                write_private(new, key.rstrip(b"\n") + b"\n" + chain)
                certificate, context = _read_new(new)
                path = self.path / file_name(certificate.names)
                new.replace(path)
                sync_folder(self.path)
                stored = replace(certificate, files=_stored_file(path, path.stat()))
                self._enter(stored)
                if self._stale >= INDEX_EVERY:
                    self._write_index()
            except OSError as error:
                raise ConfigError([f"could not store a certificate in {self.path}: {reason_of(error)}"]) from None
            finally:
                with suppress(OSError):
                    new.unlink()
        return stored, context

    def remove(self, path: Path) -> None:
        """Remove a certificate; does nothing if that is not possible."""
        with self._lock, suppress(OSError):
            path.unlink()
            if self._index is not None:
                self._index.pop(path.name, None)

    def _files(self) -> Iterator[StoredFile]:
        try:
            entries = sorted(os.scandir(self.path), key=lambda each: each.name)
        except OSError:  # there is none yet
            return
        for entry in entries:
            if entry.name.endswith(SUFFIX) and not entry.name.startswith("."):
                with suppress(OSError):
                    yield _stored_file(Path(entry.path), entry.stat())

    def _enter(self, certificate: ServerCertificate) -> None:
        if self._index is not None:
            self._index[certificate.files.certificate.name] = certificate
        self._stale += 1

    def _read_index(self) -> dict[str, ServerCertificate]:
        try:
            rows = json.loads((self.path / INDEX).read_bytes())
            return {
                name: ServerCertificate(
                    StoredFile(self.path / name, (int(changed), int(size))), tuple(names), begin, end, rejected
                )
                for name, (changed, size, names, begin, end, rejected) in rows.items()
            }
        except (OSError, ValueError, TypeError, AttributeError):
            return {}

    def _write_index(self) -> None:
        """Write the index, for the owner of the folder: the daemon may not have dropped root's rights yet."""
        rows = {
            name: [*each.files.stamp, each.names, each.not_before, each.not_after, each.rejected]
            for name, each in (self._index or {}).items()
            if isinstance(each.files, StoredFile)
        }
        new = temporary_beside(self.path / "index")
        try:
            new.unlink(missing_ok=True)
            write_private(new, json.dumps(rows, separators=(",", ":")).encode())
            owner = self.path.stat()
            if owner.st_uid != os.geteuid():  # the unit for systemd forbids chown
                os.chown(new, owner.st_uid, owner.st_gid)
            new.replace(self.path / INDEX)
            self._stale = 0
        except OSError:  # a reader without write access, or a full disk: the next start takes longer
            with suppress(OSError):
                new.unlink()


def file_name(names: tuple[str, ...]) -> str:
    """The file for a certificate with these names. Raises `ConfigError` if the first one cannot be a file name."""
    name = next(iter(names), "")
    if not _FILE_NAME.fullmatch(name):
        raise ConfigError([f"a certificate for {name!r} cannot be stored: it has no host name"])
    return f"{name.replace('*', '_wildcard')}{SUFFIX}"


def _stored_file(path: Path, about: os.stat_result) -> StoredFile:
    return StoredFile(path, (about.st_ctime_ns, about.st_size))


def _read_new(path: Path) -> tuple[ServerCertificate, ssl.SSLContext]:
    """Read a file under its temporary name, which problems do not mention. Raises `ConfigError`."""
    try:
        return ServerCertificate.read(StoredFile(path))
    except ConfigError as error:
        raise ConfigError([problem.replace(f" {path}", "") for problem in error.problems]) from None
