"""Identities: only the two owners of the expected keys can shake hands, and the key file is private."""

from __future__ import annotations

import hashlib
import os
import ssl
from contextlib import suppress
from pathlib import Path

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519

from tunneld.errors import ConfigError, RemoteProtocolError
from tunneld.net.node_id import NodeId
from tunneld.tls.identity import Identity, is_signed_by, node_id, peer_context
from tunneld.tls.session import TlsSession

SEED = bytes(range(32))
ROUNDS = 4

ALICE, BOB, CAROL = (Identity.from_seed(bytes([letter]) * 32) for letter in b"abc")


def shake_hands(server: ssl.SSLContext, client: ssl.SSLContext) -> tuple[TlsSession, TlsSession]:
    """Both ends after a handshake in memory. Raises the first error of either."""
    host, visitor = TlsSession(server, server_side=True), TlsSession(client)
    done = 0
    for _ in range(ROUNDS):
        for end, other in ((visitor, host), (host, visitor)):
            done += end.advance_handshake()
            if data := end.take_output():
                other.feed(data)
    assert done
    return host, visitor


def contexts(
    host: Identity, seen_by_host: Identity, visitor: Identity, seen_by_visitor: Identity, protocol: str = ""
) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    return (
        peer_context(host, seen_by_host.certificate, server_side=True, protocol=protocol),
        peer_context(visitor, seen_by_visitor.certificate, server_side=False, protocol=protocol),
    )


def received(end: TlsSession) -> bytes:
    plain = bytearray(100)
    return bytes(plain[: end.decrypt(memoryview(plain))])


def test_two_known_ends_talk() -> None:
    host, visitor = shake_hands(*contexts(ALICE, BOB, BOB, ALICE, "test/1"))
    visitor.write(memoryview(b"ping"))
    host.feed(visitor.take_output())
    assert received(host) == b"ping"
    host.write(memoryview(b"pong"))
    visitor.feed(host.take_output())
    assert received(visitor) == b"pong"
    assert (host.peer_certificate, visitor.peer_certificate) == (BOB.certificate, ALICE.certificate)
    assert host.protocol == visitor.protocol == "test/1"


def test_nothing_can_be_resumed() -> None:
    host, visitor = shake_hands(*contexts(ALICE, BOB, BOB, ALICE))
    host.write(memoryview(b"x"))
    visitor.feed(host.take_output())
    assert received(visitor) == b"x", "a ticket would have come before"
    former = visitor.session(None)
    assert former is None or not former.has_ticket


def test_a_host_with_another_key_is_refused() -> None:
    with pytest.raises(ssl.SSLError, match=r"CERTIFICATE_VERIFY_FAILED|ALERT_UNKNOWN_CA"):
        shake_hands(*contexts(CAROL, BOB, BOB, ALICE))


def test_a_visitor_with_another_key_is_refused() -> None:
    with pytest.raises(ssl.SSLError, match="CERTIFICATE_VERIFY_FAILED"):
        shake_hands(*contexts(ALICE, BOB, CAROL, ALICE))


def test_a_visitor_without_a_key_is_refused() -> None:
    server, _ = contexts(ALICE, BOB, BOB, ALICE)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    with pytest.raises(ssl.SSLError, match="PEER_DID_NOT_RETURN_A_CERTIFICATE"):
        shake_hands(server, client)


def test_a_key_of_the_same_name_that_the_peer_signed_is_refused(tmp_path: Path) -> None:
    """The pinned certificate is no authority: what its key signs is not accepted in its place."""
    mallory = ed25519.Ed25519PrivateKey.generate()
    genuine = x509.load_der_x509_certificate(BOB.certificate)
    signer = serialization.load_pem_private_key(BOB.pem, None)
    assert isinstance(signer, ed25519.Ed25519PrivateKey)
    signed = (
        x509.CertificateBuilder(issuer_name=genuine.subject, subject_name=genuine.subject)
        .public_key(mallory.public_key())
        .serial_number(2)
        .not_valid_before(genuine.not_valid_before_utc)
        .not_valid_after(genuine.not_valid_after_utc)
        .sign(signer, None)
    )
    path = tmp_path / "mallory.pem"
    key = mallory.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(key + signed.public_bytes(serialization.Encoding.PEM) + BOB.pem.partition(b"-----BEGIN C")[2])
    _, client = contexts(ALICE, BOB, BOB, ALICE)
    client.load_cert_chain(path)
    with pytest.raises(ssl.SSLError, match="CERTIFICATE_VERIFY_FAILED"):
        shake_hands(peer_context(ALICE, BOB.certificate, server_side=True), client)


def test_older_versions_of_tls_are_refused() -> None:
    server, client = contexts(ALICE, BOB, BOB, ALICE)
    client.minimum_version = client.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError, match=r"UNSUPPORTED_PROTOCOL|PROTOCOL_VERSION"):
        shake_hands(server, client)


def test_different_protocols_show_on_both_ends() -> None:
    server, _ = contexts(ALICE, BOB, BOB, ALICE, "test/1:shell")
    _, client = contexts(ALICE, BOB, BOB, ALICE, "test/1:web")
    with suppress(ssl.SSLError):  # newer versions of OpenSSL refuse the handshake
        host, visitor = shake_hands(server, client)
        assert host.protocol == visitor.protocol == ""


def test_an_identity_is_a_function_of_its_key() -> None:
    assert Identity.from_seed(SEED) == Identity.from_seed(SEED)
    key = ed25519.Ed25519PrivateKey.from_private_bytes(SEED).public_key()
    spki = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    found = Identity.from_seed(SEED)
    assert found.id.digest == hashlib.sha256(spki).digest()[:20]
    assert node_id(found.certificate) == NodeId.of_key(key.public_bytes_raw()) == found.id
    assert found.public_key() == key.public_bytes_raw()
    assert Identity.create() != Identity.create()


def test_the_key_is_not_printed() -> None:
    assert "PRIVATE" not in repr(ALICE)


def test_signatures() -> None:
    signature = ALICE.sign(b"message")
    assert is_signed_by(ALICE.public_key(), b"message", signature)
    assert not is_signed_by(ALICE.public_key(), b"another", signature)
    assert not is_signed_by(BOB.public_key(), b"message", signature)
    assert not is_signed_by(b"short", b"message", signature)
    assert not is_signed_by(ALICE.public_key(), b"message", b"")


def test_a_saved_identity_is_private_and_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "identity.pem"
    umask = os.umask(0)
    try:
        ALICE.save(path)
    finally:
        os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert Identity.load(path) == ALICE
    with pytest.raises(FileExistsError):
        BOB.save(path)
    assert Identity.load(path) == ALICE
    assert list(path.parent.iterdir()) == [path]


def test_files_that_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "identity.pem"
    with pytest.raises(FileNotFoundError):
        Identity.load(path)
    ALICE.save(path)
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        Identity.load(path)
    path.chmod(0o600)
    path.write_bytes(b"garbage")
    with pytest.raises(ConfigError, match="not a private key"):
        Identity.load(path)
    path.write_bytes(trustme.CA().private_key_pem.bytes())
    with pytest.raises(ConfigError, match="not an Ed25519 key"):
        Identity.load(path)
    path.write_bytes(
        ed25519.Ed25519PrivateKey.generate().private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    with pytest.raises(ConfigError, match="passphrase"):
        Identity.load(path)
    with pytest.raises(ConfigError, match="could not read"):
        Identity.load(tmp_path)


def test_certificates_that_are_refused() -> None:
    ecdsa = ssl.PEM_cert_to_DER_cert(trustme.CA().cert_pem.bytes().decode())
    for certificate, reason in ((ecdsa, "Ed25519"), (b"", "cannot be read"), (b"x" * 1025, "1025 bytes")):
        with pytest.raises(RemoteProtocolError, match=reason):
            node_id(certificate)
    for index in range(len(ALICE.certificate)):
        with pytest.raises(RemoteProtocolError):
            node_id(ALICE.certificate[:index])
