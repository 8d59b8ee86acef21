"""TLS contexts: their settings, and errors that name the file at fault."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from pathlib import Path

import pytest
import trustme
from cryptography.hazmat.primitives import serialization

from tunneld.config.certificates import TlsFiles
from tunneld.errors import ConfigError
from tunneld.tls import contexts
from tunneld.tls.session import is_truncation

Pem = Callable[[str], Path]


@pytest.fixture
def pem(tmp_path: Path) -> Pem:
    """Files by name: `ca`, and certificate and key of `one` and `two`, as `one.pem` and `one.key`."""
    ca = trustme.CA()
    ca.cert_pem.write_to_path(tmp_path / "ca")
    for name in ("one", "two"):
        certificate = ca.issue_cert("localhost")
        certificate.private_key_pem.write_to_path(tmp_path / f"{name}.key")
        certificate.cert_chain_pems[0].write_to_path(tmp_path / f"{name}.pem")
    (tmp_path / "garbage").write_text("no certificate")
    return lambda name: tmp_path / name


def test_a_server_speaks_modern_tls_and_requests_certificates_only_if_configured(pem: Pem) -> None:
    context = contexts.server_tls_context(TlsFiles(certificate=pem("one.pem"), key=pem("one.key")))
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    assert context.verify_mode == ssl.CERT_NONE
    context = contexts.server_tls_context(TlsFiles(certificate=pem("one.pem"), key=pem("one.key"), client_ca=pem("ca")))
    assert context.verify_mode == ssl.CERT_REQUIRED


@pytest.mark.parametrize("side", ["server", "client", "pinned"])
def test_an_end_of_file_without_close_notify_is_a_truncation(pem: Pem, side: str) -> None:
    """Any machine on the path can end a connection; Python 3.11.2 takes that for a close_notify."""
    context = {
        "server": lambda: contexts.server_tls_context(TlsFiles(certificate=pem("one.pem"), key=pem("one.key"))),
        "client": lambda: contexts.client_tls_context(pem("ca")),
        "pinned": lambda: contexts.client_tls_context(pin="sha256:" + 64 * "0"),
    }[side]()
    incoming = ssl.MemoryBIO()
    connection = context.wrap_bio(
        incoming, ssl.MemoryBIO(), side == "server", None if side == "server" else "localhost"
    )
    with pytest.raises(ssl.SSLWantReadError):
        connection.do_handshake()
    incoming.write_eof()
    with pytest.raises(ssl.SSLError) as caught:
        connection.do_handshake()
    assert is_truncation(caught.value)


@pytest.mark.parametrize(
    ("certificate", "key", "client_ca", "problem"),
    [
        ("nosuch", "one.key", None, "control.tls: could not read certificate {}/nosuch: no such file or directory"),
        ("one.pem", "nosuch", None, "control.tls: could not read key {}/nosuch: no such file or directory"),
        ("one.pem", "one.key", "nosuch", "control.tls: could not read client_ca {}/nosuch: no such file or directory"),
        ("one.pem", "two.key", None, "control.tls: key {}/two.key does not belong to certificate {}/one.pem"),
        (
            "garbage",
            "one.key",
            None,
            "control.tls: could not load certificate {0}/garbage with key {0}/one.key: not PEM files",
        ),
        (
            "one.pem",
            "garbage",
            None,
            "control.tls: could not load certificate {0}/one.pem with key {0}/garbage: not PEM files",
        ),
        ("one.pem", "one.key", "garbage", "control.tls: client_ca {}/garbage contains no PEM certificate"),
    ],
)
def test_errors_name_the_key_and_the_file(
    pem: Pem, certificate: str, key: str, client_ca: str | None, problem: str
) -> None:
    settings = TlsFiles(certificate=pem(certificate), key=pem(key), client_ca=pem(client_ca) if client_ca else None)
    with pytest.raises(ConfigError) as failed:
        contexts.server_tls_context(settings, table="control.tls")
    folder = str(pem("ca").parent)
    assert failed.value.problems[0].startswith(problem.format(folder, folder))


def test_an_encrypted_key_is_refused_without_a_password_prompt(pem: Pem) -> None:
    locked = pem("locked.key")
    key = serialization.load_pem_private_key(pem("one.key").read_bytes(), None)
    locked.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    with pytest.raises(ConfigError, match=r"^the key is protected by a passphrase"):
        contexts.server_tls_context(TlsFiles(certificate=pem("one.pem"), key=locked))


def test_a_client_checks_names_and_trusts_the_given_authorities(pem: Pem) -> None:
    context = contexts.client_tls_context(pem("ca"), pem("one.pem"), pem("one.key"))
    assert context.verify_mode == ssl.CERT_REQUIRED
    assert context.check_hostname
    assert len(context.get_ca_certs()) == 1
    assert contexts.client_tls_context().verify_mode == ssl.CERT_REQUIRED
    with pytest.raises(ConfigError, match=r"^could not read ca .*/nosuch: no such file"):
        contexts.client_tls_context(pem("nosuch"))
    with pytest.raises(ConfigError, match=r"^key .*/two.key does not belong"):
        contexts.client_tls_context(None, pem("one.pem"), pem("two.key"))
