"""Keys of the classic envelope: RSA with 1024 bits and the exponent 3. Pure, but for `new_key`.

The public key is a dictionary in addresses; the SHA-1 of its encoding is the id of the node:

    {'key header': {'type': 'public', 'cryptosystem': 'RSA', 'usage': 'only for communication security'},
     'key values': {'public modulus': 128 octets in mojosixbit, 'public exponent': '3'}}
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from tunneld.errors import LocalProtocolError, RemoteProtocolError
from tunneld.wire.egtp.fields import Dictionary, as_dictionary, dictionary_at, octets_at
from tunneld.wire.egtp.ids import from_sixbit, id_of, to_sixbit
from tunneld.wire.egtp.mesgen.ciphers import PUBLIC_EXPONENT, RSA_OCTETS, rsa_private, rsa_public
from tunneld.wire.mencode import Value, encode

BITS = 8 * RSA_OCTETS
_HEADER: Dictionary = {b"type": b"public", b"cryptosystem": b"RSA", b"usage": b"only for communication security"}


@dataclass(frozen=True, slots=True)
class ClassicPublicKey:
    """The public key of a node; `node_id` is its id."""

    modulus: int
    node_id: bytes = field(init=False)

    def __post_init__(self) -> None:
        """Raises `RemoteProtocolError` unless the modulus is odd and has 1024 bits."""
        if self.modulus.bit_length() != BITS or not self.modulus & 1:
            raise RemoteProtocolError(f"not an RSA modulus of {BITS} bits")
        object.__setattr__(self, "node_id", id_of(encode(self.encode())))

    @property
    def octets(self) -> bytes:
        """The modulus, most significant octet first."""
        return self.modulus.to_bytes(RSA_OCTETS, "big")

    def encode(self) -> Value:
        """The value in addresses."""
        values: Dictionary = {b"public modulus": to_sixbit(self.octets), b"public exponent": b"%d" % PUBLIC_EXPONENT}
        return {b"key header": _HEADER, b"key values": values}

    def apply(self, number: bytes) -> bytes:
        """Encrypt, or check a signature: RSA on 128 octets. Raises `RemoteProtocolError` if they are too large."""
        return rsa_public(self.modulus, number)


def parse_public_key(value: Value) -> ClassicPublicKey:
    """The key in an address. Raises `RemoteProtocolError` unless it has the only encoding of such a key."""
    fields = as_dictionary(value, "a public key")
    modulus = from_sixbit(octets_at(dictionary_at(fields, b"key values"), b"public modulus"))
    key = ClassicPublicKey(int.from_bytes(modulus, "big"))
    if key.encode() != value:
        raise RemoteProtocolError(f"EGTP message: 'pubkey' is not an RSA key with the exponent {PUBLIC_EXPONENT}")
    return key


@dataclass(frozen=True, slots=True, repr=False)
class ClassicKey:
    """The private key of a node."""

    public: ClassicPublicKey
    exponent: int

    def __post_init__(self) -> None:
        """Raises `LocalProtocolError` unless the exponent belongs to the public key."""
        probe = (2).to_bytes(RSA_OCTETS, "big")
        if not 0 < self.exponent < self.public.modulus or self.apply(self.public.apply(probe)) != probe:
            raise LocalProtocolError("the private exponent does not belong to the modulus")

    @property
    def node_id(self) -> bytes:
        """The id of the node."""
        return self.public.node_id

    def apply(self, number: bytes) -> bytes:
        """Decrypt, or sign: RSA on 128 octets. Raises `RemoteProtocolError` if they are too large."""
        return rsa_private(self.public.modulus, self.exponent, number)


def new_key() -> tuple[ClassicKey, bytes]:
    """Make a key; also returns it as PEM, for a file that only its owner can read."""
    made = generate_private_key(PUBLIC_EXPONENT, BITS)
    return _from_library(made), made.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def load_key(pem: bytes) -> ClassicKey:
    """The key in a PEM file. Raises `LocalProtocolError` if it is another kind of key, or none."""
    try:
        loaded = load_pem_private_key(pem, password=None)
    except (ValueError, TypeError) as problem:
        raise LocalProtocolError(f"not a private key in PEM: {problem}") from None
    if not isinstance(loaded, RSAPrivateKey) or loaded.key_size != BITS:
        raise LocalProtocolError(f"the classic envelope needs an RSA key of {BITS} bits")
    return _from_library(loaded)


def _from_library(key: RSAPrivateKey) -> ClassicKey:
    numbers = key.private_numbers()
    return ClassicKey(ClassicPublicKey(numbers.public_numbers.n), numbers.d)
