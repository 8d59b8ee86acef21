"""The certificate store of a relay: which TLS context a handshake uses, for a port or for a server name.

    CertificateStore
    ├─ ports      by table of the configuration: the certificate of a port, with its rules for client certificates
    └─ names      by server name: the certificates in the configuration and those that were `put` into the folder

Each handshake asks for its context when it begins and keeps it to its end, so certificates can be replaced at any time.
Replacing never makes things worse: what cannot be loaded is reported, and the certificate in use stays.

Whatever obtains certificates automatically calls `put`, or `write` in a thread and then `use`.
"""

from __future__ import annotations

import ssl
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tunneld.errors import ConfigError
from tunneld.log import Logger
from tunneld.tls.certificate import ServerCertificate
from tunneld.tls.connection import CARRIER_PROTOCOL, CONTROL_PROTOCOL
from tunneld.tls.contexts import CertificateFiles, server_tls_context
from tunneld.tls.folder import CertificateFolder

log = Logger("tls")

MAX_CONTEXTS = 1000
"""Contexts of named certificates kept in memory, 21 KiB each: 20 MiB. Others are loaded again when they are needed,
which takes a millisecond.
"""
AGENT_TABLE = "control.tls"
"""The certificate for agents, by whichever port they come."""
PROTOCOLS = ("http/1.1",)
"""ALPN of host names, unless `offer` changes it. Without it, clients that offer several protocols would have to guess
(RFC 7301).
"""


@dataclass(frozen=True, slots=True)
class LoadedCertificates:
    """The result of `CertificateStore.load`, for `apply`."""

    ports: Mapping[str, tuple[ServerCertificate, ssl.SSLContext]] = field(default_factory=dict)  # by table
    named: Sequence[tuple[ServerCertificate, ssl.SSLContext]] = ()  # of the configuration
    stored: Sequence[ServerCertificate] = ()  # of the folder; contexts are loaded when they are needed


class CertificateStore:
    """See the description of this module."""

    def __init__(self, folder: Path | None = None, max_contexts: int = MAX_CONTEXTS) -> None:
        """`folder` keeps certificates that are `put`; None: the relay obtains none itself."""
        self.is_used: Callable[[ServerCertificate], bool] = lambda _: True
        """Whether a stored certificate still serves visitors: the dates of no other are a problem."""
        self._protocols: Sequence[str] = PROTOCOLS
        self._folder = CertificateFolder(folder) if folder is not None else None
        self._max_contexts = max_contexts
        self._loaded = LoadedCertificates()
        self._stored: dict[Path, ServerCertificate] = {}
        self._names: dict[str, ServerCertificate] = {}
        self._contexts: OrderedDict[Path, ssl.SSLContext] = OrderedDict()  # by certificate file, least recent first

    def offer(self, protocols: Sequence[str]) -> None:
        """Choose among these protocols (ALPN), by preference, in every later handshake for a name."""
        self._protocols = protocols
        for context in self._contexts.values():
            context.set_alpn_protocols(protocols)

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
        if (agents := by_table.get(AGENT_TABLE)) is not None:
            agents[1].set_alpn_protocols([CONTROL_PROTOCOL, CARRIER_PROTOCOL])
        by_key = _read_all(named or {}, problems)
        problems += [
            f"{table}: certificate {each.files.certificate} has no host name"
            + (f": {each.rejected}" if each.rejected else "")
            for table, (each, _) in by_key.items()
            if not each.names
        ]
        if problems:
            raise ConfigError(problems)
        stored = self._folder.read(self._stored) if self._folder is not None else ()
        return LoadedCertificates(by_table, tuple(by_key.values()), stored)

    def apply(self, loaded: LoadedCertificates) -> None:
        """Use these certificates for every handshake that begins from now on."""
        self._loaded = loaded
        former, self._stored = self._stored, {each.files.certificate: each for each in loaded.stored}
        kept = {path for path, certificate in self._stored.items() if former.get(path) == certificate}
        for path in [path for path in self._contexts if path not in kept]:
            del self._contexts[path]
        for certificate, context in loaded.named:
            self._keep(certificate, context)
        self._index()

    def put(self, chain: bytes, key: bytes) -> ServerCertificate:
        """Store a certificate and its private key, both in PEM, and use it for every later handshake with its names.

        It replaces the stored certificate with the same first name. This blocks until it is on disk. Raises
        `ConfigError` if the two do not belong together or cannot be written; then nothing has changed.
        """
        written = self.write(chain, key)
        self.use(written)
        return written[0]

    def write(self, chain: bytes, key: bytes) -> tuple[ServerCertificate, ssl.SSLContext]:
        """The first half of `put`: store the files. May be called in a worker thread."""
        if self._folder is None:
            raise ConfigError(["no folder for certificates; set daemon.state"])
        return self._folder.write(chain, key)

    def use(self, written: tuple[ServerCertificate, ssl.SSLContext]) -> None:
        """The second half: use what `write` returned."""
        certificate, context = written
        path = certificate.files.certificate
        former = self._stored.get(path)
        self._stored[path] = certificate
        self._keep(certificate, context)
        if former is None or set(former.names) <= set(certificate.names):
            for name in certificate.names:
                self._prefer(name, certificate)
        else:
            self._index()
        log.info("certificate stored", file=str(path), names=list(certificate.names))

    def remove(self, certificate: ServerCertificate) -> None:
        """Remove a stored certificate, and its file."""
        path = certificate.files.certificate
        if self._folder is not None and self._stored.pop(path, None) is not None:
            self._folder.remove(path)
            self._contexts.pop(path, None)
            self._index()

    # For handshakes

    def port(self, table: str) -> ssl.SSLContext | None:
        """The context for a handshake on the port with this table; None if the port does not use TLS."""
        found = self._loaded.ports.get(table)
        return found[1] if found is not None else None

    def has_name(self, server_name: str) -> bool:
        """Whether `context_for` finds a certificate."""
        return self.certificate_for(server_name.lower().removesuffix(".")) is not None

    def context_for(self, server_name: str) -> ssl.SSLContext | None:
        """The context for a handshake in which the client asked for `server_name`: the certificate with exactly this
        name, else the one with a wildcard for its first label, else None.
        """
        certificate = self.certificate_for(server_name.lower().removesuffix("."))
        if certificate is None:
            return None
        context = self._contexts.get(certificate.files.certificate)
        if context is None:
            return self._load_again(certificate)
        self._contexts.move_to_end(certificate.files.certificate)
        return context

    def certificate_for(self, name: str) -> ServerCertificate | None:
        """The certificate that handshakes for a host name in lower case use; None: there is none."""
        if name.startswith("*"):
            return None
        return self._names.get(name) or self._names.get(f"*.{name.partition('.')[2]}")

    # For operators

    def certificates(self) -> list[ServerCertificate]:
        """All certificates, once per file."""
        found = [certificate for certificate, _ in (*self._loaded.ports.values(), *self._loaded.named)]
        return list({each.files.certificate: each for each in (*found, *self._stored.values())}.values())

    def configured(self) -> list[ServerCertificate]:
        """The certificates of the configuration for host names."""
        return [certificate for certificate, _ in self._loaded.named]

    def stored(self) -> list[ServerCertificate]:
        """The certificates of the folder."""
        return list(self._stored.values())

    def stored_for(self, name: str) -> ServerCertificate | None:
        """The certificate of the folder with exactly this name, which may begin with `*.`."""
        found = self._names.get(name)
        return found if found is not None and found.files.certificate in self._stored else None

    def seconds_left(self, now: float | None = None) -> dict[str, float]:
        """Seconds until each certificate in use expires, by its first name. `now` is as for `expiring`."""
        moment = time.time() if now is None else now
        return {
            each.names[0]: each.not_after - moment
            for each in self.certificates()
            if each.names
            and each.not_after is not None
            and (each.files.certificate not in self._stored or self.is_used(each))
        }

    def expiring(self, now: float | None = None) -> list[str]:
        """Which certificates clients reject, or will soon, in a few words each, for the status. Each is logged, too.
        `now` is in seconds since 1970, by default the current time.
        """
        moment = time.time() if now is None else now
        problems = []
        for certificate in self.certificates():
            if certificate.files.certificate in self._stored and not self.is_used(certificate):
                continue
            if problem := certificate.problem(moment):
                problems.append(problem)
                if certificate.is_valid(moment):
                    log.warning("certificate expires soon", problem=problem)
                else:
                    log.error("clients reject the certificate", problem=problem)
        return problems

    # Internals

    def _index(self) -> None:
        """Map names to certificates."""
        self._names = {name: each for each, _ in self._loaded.named for name in each.names}
        for certificate in self._stored.values():
            for name in certificate.names:
                self._prefer(name, certificate)

    def _prefer(self, name: str, certificate: ServerCertificate) -> None:
        """Use a stored certificate for a name, unless a configured one has it, or a stored one that expires later."""
        now = self._names.get(name)
        if now is not None:
            path = now.files.certificate
            if path not in self._stored:
                return
            if path != certificate.files.certificate and (now.not_after or 0.0) > (certificate.not_after or 0.0):
                return
        self._names[name] = certificate

    def _keep(self, certificate: ServerCertificate, context: ssl.SSLContext) -> None:
        context.set_alpn_protocols(self._protocols)
        self._contexts[certificate.files.certificate] = context
        self._contexts.move_to_end(certificate.files.certificate)
        while len(self._contexts) > self._max_contexts:
            self._contexts.popitem(last=False)

    def _load_again(self, certificate: ServerCertificate) -> ssl.SSLContext | None:
        """Load a context that is not in memory; None, and a line in the log, if its file cannot be loaded any more."""
        try:
            context = server_tls_context(certificate.files)
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
