"""Certificates for tests: a CA, a relay and a client, as files and as TLS contexts."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

import trustme

from tunneld.config.certificates import TlsFiles
from tunneld.tls import contexts
from tunneld.tls.pins import first_fingerprint


@dataclass(frozen=True)
class Pki:
    """A CA with a certificate for the relay and one for a client, as files in a folder."""

    folder: Path

    @classmethod
    def issue(cls, folder: Path, *names: str) -> Pki:
        """`names` are those of the server, beside its loopback ones."""
        folder.mkdir(exist_ok=True)
        ca = trustme.CA()
        server = ca.issue_cert("localhost", "127.0.0.1", *names)
        ca.cert_pem.write_to_path(folder / "ca.pem")
        server.cert_chain_pems[0].write_to_path(folder / "relay.pem")
        server.private_key_pem.write_to_path(folder / "relay.key")
        ca.issue_cert("agent@example.org").private_key_and_cert_chain_pem.write_to_path(folder / "client.pem")
        return cls(folder)

    @property
    def server(self) -> ssl.SSLContext:
        return contexts.server_tls_context(
            TlsFiles(certificate=self.folder / "relay.pem", key=self.folder / "relay.key")
        )

    @property
    def mutual(self) -> ssl.SSLContext:
        folder = self.folder
        tls = TlsFiles(certificate=folder / "relay.pem", key=folder / "relay.key", client_ca=folder / "ca.pem")
        return contexts.server_tls_context(tls)

    @property
    def client(self) -> ssl.SSLContext:
        return contexts.client_tls_context(self.folder / "ca.pem")

    @property
    def pin(self) -> str:
        return first_fingerprint(self.folder / "relay.pem")
