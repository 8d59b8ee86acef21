"""Identities: Ed25519 keys by which two ends know each other through a relay that neither of them trusts.

    Identity          a key and its certificate; created once, kept in a file
    NodeId            SHA-256 of the public key (its SubjectPublicKeyInfo in DER), cut to 20 bytes
    peer_context      TLS 1.3 between an identity and the owner of one certificate

The certificate is a function of the key: self-signed, without dates that could pass, with the same name for every key.
Nothing in it is believed. Before the handshake each end sends its certificate to the other, in the clear and
unauthenticated. The receiver compares its `node_id` with the ids that it admits, and trusts this one certificate as the
only authority of the handshake, in which the peer proves that it holds the key. So the standard library, which has no
way to ask the program about a certificate, checks pinned keys on both sides.

160 bits are enough for an id. To pass for another node, an attacker needs a key whose hash is the given id: a second
preimage, 2^160 steps. Two keys with one id (a collision, 2^80 steps) are both the attacker's own, and help only to make
an id that is known to be the attacker's.
"""

from __future__ import annotations

import os
import ssl
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

from tunneld.errors import ConfigError, RemoteProtocolError, reason_of
from tunneld.net.node_id import NodeId
from tunneld.tls.private_files import sync_folder, temporary_beside, write_private
from tunneld.tls.session import require_close_notify

MAX_CERTIFICATE = 1024
"""Bytes of a peer's certificate. Ours have about 250; a peer may use another program. As in the preamble of a visit."""
NAME = "tunneld"
"""The subject of every certificate."""
FIRST_DAY = datetime(1970, 1, 1, tzinfo=UTC)
NO_END = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)
"""The date of a certificate without an end (RFC 5280 §4.1.2.5). An identity lasts until its owner replaces it."""
MAX_SEED = 32
"""Bytes of an Ed25519 private key."""


@dataclass(frozen=True, slots=True)
class Identity:
    """An Ed25519 key with its self-signed certificate. Made by `create`, `from_seed` and `load`."""

    id: NodeId
    certificate: bytes  # in DER
    pem: bytes = field(repr=False)  # the private key and the certificate

    @classmethod
    def create(cls) -> Identity:
        """A new key, whose id does not look like an option on a command line."""
        while str((made := cls.from_seed(os.urandom(MAX_SEED))).id).startswith("-"):
            pass
        return made

    @classmethod
    def from_seed(cls, seed: bytes) -> Identity:
        """The identity with this private key of 32 bytes (RFC 8032 §5.1.5): always the same one."""
        from cryptography.hazmat.primitives import serialization  # noqa: PLC0415  # slow to import, and few need it
        from cryptography.hazmat.primitives.asymmetric import ed25519  # noqa: PLC0415

        key = ed25519.Ed25519PrivateKey.from_private_bytes(seed)
        certificate = _self_signed(key)
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return cls(node_id(certificate), certificate, private + ssl.DER_cert_to_PEM_cert(certificate).encode())

    @classmethod
    def load(cls, path: Path) -> Identity:
        """Read what `save` wrote, or any Ed25519 key in PEM that is not encrypted. Raises `ConfigError`, also if other
        users may read the file, and `FileNotFoundError`.
        """
        try:
            mode = path.stat().st_mode
            pem = path.read_bytes()
        except FileNotFoundError:
            raise
        except OSError as error:
            raise ConfigError([f"could not read identity {path}: {reason_of(error)}"]) from None
        if stat.S_IMODE(mode) & 0o077:
            raise ConfigError([f"identity {path} can be read by other users; run: chmod 600 {path}"])
        return cls.from_seed(_seed_in(pem, path))

    def save(self, path: Path) -> None:
        """Write the key to a new file that only this user can read, complete or not at all, and create its folder.
        Raises `FileExistsError`, and OSError.
        """
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = temporary_beside(path)
        temporary.unlink(missing_ok=True)
        write_private(temporary, self.pem)
        try:
            os.link(temporary, path)  # unlike a rename, it replaces nothing
        finally:
            temporary.unlink()
        sync_folder(path.parent)

    def sign(self, message: bytes) -> bytes:
        """The Ed25519 signature of a message. The caller puts a context in front of it that nothing else uses."""
        from cryptography.hazmat.primitives import serialization  # noqa: PLC0415  # see `from_seed`
        from cryptography.hazmat.primitives.asymmetric import ed25519  # noqa: PLC0415

        key = serialization.load_pem_private_key(self.pem, None)
        assert isinstance(key, ed25519.Ed25519PrivateKey)
        return key.sign(message)

    def public_key(self) -> bytes:
        """The public key: 32 bytes, see `NodeId.of_key`."""
        return _public_key(self.certificate)


@lru_cache(maxsize=256)
def node_id(certificate: bytes) -> NodeId:
    """The id of the key in a certificate in DER. Raises `RemoteProtocolError` where it is no certificate with an
    Ed25519 key.
    """
    return NodeId.of_key(_public_key(certificate))


def is_signed_by(public_key: bytes, message: bytes, signature: bytes) -> bool:
    """Whether `signature` is that of `message` by the owner of an Ed25519 public key."""
    from cryptography.exceptions import InvalidSignature  # noqa: PLC0415  # see `Identity.from_seed`
    from cryptography.hazmat.primitives.asymmetric import ed25519  # noqa: PLC0415

    try:
        ed25519.Ed25519PublicKey.from_public_bytes(public_key).verify(signature, message)
    except (ValueError, InvalidSignature):
        return False
    return True


def peer_context(
    identity: Identity, peer_certificate: bytes, *, server_side: bool, protocol: str = ""
) -> ssl.SSLContext:
    """A context for TLS 1.3 between `identity` and the owner of `peer_certificate`, whose `node_id` the caller has
    compared with the one that it expects. Any other key fails the handshake, on both sides.

    There are no tickets: every connection has fresh keys, and its handshake proves both identities. Both ends must give
    the same `protocol`, and compare it with `TlsSession.protocol` after the handshake: OpenSSL goes on without one.
    Raises `RemoteProtocolError` where OpenSSL cannot read the certificate.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server_side else ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False  # the name means nothing: the key is what is checked
    context.verify_mode = ssl.CERT_REQUIRED
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_3
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION
    if server_side:
        context.num_tickets = 0
    require_close_notify(context)
    if protocol:
        context.set_alpn_protocols([protocol])
    try:
        context.load_verify_locations(cadata=peer_certificate)
    except (ssl.SSLError, ValueError):
        raise RemoteProtocolError("the peer's certificate cannot be read") from None
    with _as_file(identity.pem) as path:
        context.load_cert_chain(path)
    return context


def _public_key(certificate: bytes) -> bytes:
    from cryptography import x509  # noqa: PLC0415  # see `Identity.from_seed`
    from cryptography.exceptions import UnsupportedAlgorithm  # noqa: PLC0415
    from cryptography.hazmat.primitives.asymmetric import ed25519  # noqa: PLC0415

    if len(certificate) > MAX_CERTIFICATE:
        raise RemoteProtocolError(f"certificate of {len(certificate)} bytes, at most {MAX_CERTIFICATE} are accepted")
    try:
        key = x509.load_der_x509_certificate(certificate).public_key()
    except (ValueError, UnsupportedAlgorithm):
        raise RemoteProtocolError("the peer's certificate cannot be read") from None
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise RemoteProtocolError("the peer's certificate has no Ed25519 key")
    return key.public_bytes_raw()


def _self_signed(key: object) -> bytes:
    from cryptography import x509  # noqa: PLC0415  # see `Identity.from_seed`
    from cryptography.hazmat.primitives import serialization  # noqa: PLC0415
    from cryptography.hazmat.primitives.asymmetric import ed25519  # noqa: PLC0415
    from cryptography.x509.oid import NameOID  # noqa: PLC0415

    assert isinstance(key, ed25519.Ed25519PrivateKey)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, NAME)])
    certificate = (
        x509.CertificateBuilder(issuer_name=name, subject_name=name, public_key=key.public_key())
        .serial_number(1)
        .not_valid_before(FIRST_DAY)
        .not_valid_after(NO_END)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(key, None)
    )
    return certificate.public_bytes(serialization.Encoding.DER)


def _seed_in(pem: bytes, path: Path) -> bytes:
    """The private key in a PEM file. Raises `ConfigError`."""
    from cryptography.exceptions import UnsupportedAlgorithm  # noqa: PLC0415  # see `Identity.from_seed`
    from cryptography.hazmat.primitives import serialization  # noqa: PLC0415
    from cryptography.hazmat.primitives.asymmetric import ed25519  # noqa: PLC0415

    try:
        key = serialization.load_pem_private_key(pem, None)
    except TypeError:
        raise ConfigError([f"identity {path} is protected by a passphrase; remove the passphrase"]) from None
    except (ValueError, UnsupportedAlgorithm):
        raise ConfigError([f"identity {path} is not a private key in PEM"]) from None
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise ConfigError([f"identity {path} is not an Ed25519 key; create one with: tunnel identity create"])
    return key.private_bytes_raw()


@contextmanager
def _as_file(content: bytes) -> Iterator[str]:
    """The path of a file with this content, for the standard library, which reads keys from files only. On Linux it is
    in memory.
    """
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("tunneld-identity", os.MFD_CLOEXEC)
        with os.fdopen(descriptor, "wb", buffering=0) as file:
            file.write(content)
            yield f"/proc/self/fd/{descriptor}"
        return
    with tempfile.NamedTemporaryFile() as file:  # of mode 0600
        file.write(content)
        file.flush()
        yield file.name
