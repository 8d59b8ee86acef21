"""The certificate store of a relay: which TLS context a handshake uses, for a port or for a server name.

    CertificateStore
    ├─ ports      by table of the configuration: the certificate of a port, with its rules for client certificates
    └─ names      by server name: the certificates in the configuration and those that were `put` into the folder

Each handshake asks for its context when it begins and keeps it to its end, so certificates can be replaced at any time.
Replacing never makes things worse: what cannot be loaded is reported, and the certificate in use stays.

A certificate in the folder is one file, its key and its chain, so that a renewal is a single rename and a crash leaves
the old pair or the new one. Whatever obtains certificates automatically calls `put`, and needs nothing else from here.
"""

from __future__ import annotations

import re
import ssl
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import structlog

from tunneld.errors import ConfigError, reason_of
from tunneld.tls.certificate import ServerCertificate
from tunneld.tls.contexts import CertificateFiles
from tunneld.tls.private_files import sync_folder, temporary_beside, write_private

log: structlog.stdlib.BoundLogger = structlog.get_logger("tls")

MAX_CONTEXTS = 1000
"""Contexts of named certificates kept in memory, 21 KiB each: 20 MiB. Others are loaded again when they are needed,
which takes a millisecond.
"""
SUFFIX = ".pem"
_FILE_NAME = re.compile(r"(?:\*\.)?[a-z0-9_](?:[a-z0-9._-]*[a-z0-9_])?")
"""Names that can be a file name, a `*.` apart."""


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A certificate in the folder: its key and its chain in one file. Implements `CertificateFiles`."""

    certificate: Path
    client_ca: Path | None = None

    @property
    def key(self) -> Path:
        """The same file."""
        return self.certificate


@dataclass(frozen=True, slots=True)
class LoadedCertificates:
    """The result of `CertificateStore.load`, for `apply`."""

    ports: Mapping[str, tuple[ServerCertificate, ssl.SSLContext]] = field(default_factory=dict)  # by table
    named: Sequence[tuple[ServerCertificate, ssl.SSLContext]] = ()  # of the configuration
    stored: Sequence[tuple[ServerCertificate, ssl.SSLContext | None]] = ()  # of the folder


class CertificateStore:
    """See the description of this module."""

    def __init__(self, folder: Path | None = None, max_contexts: int = MAX_CONTEXTS) -> None:
        """`folder` keeps certificates that are `put`; None: the relay obtains none itself."""
        self._folder = folder
        self._max_contexts = max_contexts
        self._loaded = LoadedCertificates()
        self._stored: dict[Path, ServerCertificate] = {}
        self._names: dict[str, ServerCertificate] = {}
        self._contexts: OrderedDict[Path, ssl.SSLContext] = OrderedDict()  # by certificate file, least recent first

    # Replacing

    def load(
        self, ports: Mapping[str, CertificateFiles], named: Mapping[str, CertificateFiles] | None = None
    ) -> LoadedCertificates:
        """Read all files again: those of `ports` and `named`, by the table that names them, and those in the folder.
        Nothing changes until `apply`.

        Raises `ConfigError` with all problems of the configured files. A file in the folder that cannot be loaded is
        logged; its former certificate stays in use.
        """
        problems: list[str] = []
        by_table = _read_all(ports, problems)
        by_key = _read_all(named or {}, problems)
        if problems:
            raise ConfigError(problems)
        return LoadedCertificates(by_table, tuple(by_key.values()), list(self._read_folder()))

    def apply(self, loaded: LoadedCertificates) -> None:
        """Use these certificates for every handshake that begins from now on."""
        self._loaded = loaded
        self._stored = {certificate.files.certificate: certificate for certificate, _ in loaded.stored}
        self._contexts.clear()
        for certificate, context in (*loaded.stored, *loaded.named):
            if context is not None:
                self._keep(certificate, context)
        self._index()

    def put(self, chain: bytes, key: bytes) -> ServerCertificate:
        """Store a certificate and its private key, both in PEM, and use it for every later handshake with its names.

        It replaces the stored certificate with the same first name. The file has mode 0600 and is written by a rename.
        This blocks until it is on disk. Raises `ConfigError` if the two do not belong together or cannot be written;
        then nothing has changed.
        """
        if self._folder is None:
            raise ConfigError(["no folder for certificates; set daemon.state"])
        new = temporary_beside(self._folder / "new")
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            new.unlink(missing_ok=True)  # of a process that crashed
            write_private(new, key.rstrip(b"\n") + b"\n" + chain)
            certificate, context = _read_new(new)
            path = self._folder / _file_name(certificate)
            new.replace(path)
            sync_folder(self._folder)
        except OSError as error:
            raise ConfigError([f"could not store a certificate in {self._folder}: {reason_of(error)}"]) from None
        finally:
            with suppress(OSError):
                new.unlink()
        stored = replace(certificate, files=StoredFile(path))
        self._stored[path] = stored
        self._keep(stored, context)
        self._index()
        log.info("certificate stored", file=str(path), names=list(stored.names))
        return stored

    # For handshakes

    def port(self, table: str) -> ssl.SSLContext | None:
        """The context for a handshake on the port with this table; None if the port does not use TLS."""
        found = self._loaded.ports.get(table)
        return found[1] if found is not None else None

    def has_name(self, server_name: str) -> bool:
        """Whether `context_for` finds a certificate."""
        return self._find(server_name) is not None

    def context_for(self, server_name: str) -> ssl.SSLContext | None:
        """The context for a handshake in which the client asked for `server_name`: the certificate with exactly this
        name, else the one with a wildcard for its first label, else None.
        """
        certificate = self._find(server_name)
        if certificate is None:
            return None
        context = self._contexts.get(certificate.files.certificate)
        if context is None:
            return self._load_again(certificate)
        self._contexts.move_to_end(certificate.files.certificate)
        return context

    def _find(self, server_name: str) -> ServerCertificate | None:
        name = server_name.lower().removesuffix(".")
        if name.startswith("*"):
            return None
        return self._names.get(name) or self._names.get(f"*.{name.partition('.')[2]}")

    # For operators

    def certificates(self) -> list[ServerCertificate]:
        """All certificates, once per file."""
        found = [certificate for certificate, _ in (*self._loaded.ports.values(), *self._loaded.named)]
        return list({each.files.certificate: each for each in (*found, *self._stored.values())}.values())

    def expiring(self, now: float | None = None) -> list[str]:
        """Which certificates clients reject, or will soon, in a few words each, for the status. Each is logged, too.
        `now` is in seconds since 1970, by default the current time.
        """
        moment = time.time() if now is None else now
        problems = []
        for certificate in self.certificates():
            if problem := certificate.problem(moment):
                problems.append(problem)
                if certificate.is_valid(moment):
                    log.warning("certificate expires soon", problem=problem)
                else:
                    log.error("clients reject the certificate", problem=problem)
        return problems

    # Internals

    def _read_folder(self) -> Iterable[tuple[ServerCertificate, ssl.SSLContext | None]]:
        for path in sorted(self._folder.glob(f"[!.]*{SUFFIX}")) if self._folder is not None else ():
            try:
                yield ServerCertificate.read(StoredFile(path))
            except ConfigError as error:
                log.warning("could not load a stored certificate", file=str(path), reason=str(error))
                if path in self._stored:
                    yield self._stored[path], self._contexts.get(path)

    def _index(self) -> None:
        """Map names to certificates. Of several with one name, the configured one is used, then the one that expires
        last.
        """
        stored = sorted(self._stored.values(), key=lambda each: each.not_after or 0.0)
        configured = [certificate for certificate, _ in self._loaded.named]
        self._names = {name: each for each in (*stored, *configured) for name in each.names}

    def _keep(self, certificate: ServerCertificate, context: ssl.SSLContext) -> None:
        self._contexts[certificate.files.certificate] = context
        self._contexts.move_to_end(certificate.files.certificate)
        while len(self._contexts) > self._max_contexts:
            self._contexts.popitem(last=False)

    def _load_again(self, certificate: ServerCertificate) -> ssl.SSLContext | None:
        """Load a context that was dropped; None, and a line in the log, if its file cannot be loaded any more."""
        try:
            context = ServerCertificate.read(certificate.files)[1]
        except ConfigError as error:
            log.warning("could not load a certificate", file=str(certificate.files.certificate), reason=str(error))
            return None
        self._keep(certificate, context)
        return context


def _read_all(
    files: Mapping[str, CertificateFiles], problems: list[str]
) -> dict[str, tuple[ServerCertificate, ssl.SSLContext]]:
    """Read all certificates; what cannot be loaded is added to `problems`."""
    read = {}
    for table, each in files.items():
        try:
            read[table] = ServerCertificate.read(each, table)
        except ConfigError as error:
            problems += error.problems
    return read


def _file_name(certificate: ServerCertificate) -> str:
    """The file for a certificate to be stored, by its first name. Raises `ConfigError` if it has none that can be."""
    name = next(iter(certificate.names), "")
    if not _FILE_NAME.fullmatch(name):
        raise ConfigError([f"a certificate for {name!r} cannot be stored: it has no host name"])
    return f"{name.replace('*', '_wildcard')}{SUFFIX}"


def _read_new(path: Path) -> tuple[ServerCertificate, ssl.SSLContext]:
    """Read a file under its temporary name, which problems do not mention. Raises `ConfigError`."""
    try:
        return ServerCertificate.read(StoredFile(path))
    except ConfigError as error:
        raise ConfigError([problem.replace(f" {path}", "") for problem in error.problems]) from None
