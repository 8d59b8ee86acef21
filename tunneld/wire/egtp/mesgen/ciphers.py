"""The algorithms of the classic envelope, none of them standard. Pure.

    R(seed, n)   n pseudo-random octets: SHA-1 of a mencoded dictionary with the seed and a counter, block after block.
                 The counter is "0", then "1L", "2L": how Python 2 wrote long integers.
    OAEP         as in PKCS #1 v2 with SHA-1 and an empty label, but with R in place of MGF1.
    E(key, iv)   DES-XEX3, also called DESX, in CBC mode with ciphertext stealing. The key is 8 octets of whitening
                 before DES, 8 of DES, 8 of whitening after it. The last two blocks are always swapped (CS3).
    H(key, m)    SHA1(m | SHA1(key | m)), the MAC. It is not HMAC.
    RSA          with 1024 bits and the exponent 3, on numbers of 128 octets that OAEP padded.

DESX in CBC mode is DES in CBC mode between two constant masks: with D for what leaves DES,
D[i] = DES(P[i] ^ before ^ after ^ D[i-1]) and C[i] = D[i] ^ after. So OpenSSL does the work, as 3DES with three times
the same key, and any length takes linear time: 40 ms for 1 MiB, so there is a form in steps of it.
"""

from __future__ import annotations

import hashlib
import hmac

from cryptography.hazmat.decrepit.ciphers.algorithms import TripleDES
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.modes import CBC

from tunneld.errors import LocalProtocolError, RemoteProtocolError
from tunneld.wire.egtp.ids import to_sixbit
from tunneld.wire.egtp.steps import PIECE, Steps, finish
from tunneld.wire.mencode import Value, encode

BLOCK_OCTETS = 8
KEY_OCTETS = 24
HASH_OCTETS = 20
RSA_OCTETS = 128
PADDED_OCTETS = RSA_OCTETS - 1
"""Octets of an OAEP block: one fewer than the modulus, so that its number is smaller."""

PUBLIC_EXPONENT = 3


def sha1(octets: bytes) -> bytes:
    """SHA-1."""
    return hashlib.sha1(octets, usedforsecurity=False).digest()


def keyed_hash(key: bytes, message: bytes) -> bytes:
    """H, the MAC of the envelope."""
    return sha1(message + sha1(key + message))


def sha_random(seed: bytes, length: int) -> bytes:
    """R: `length` pseudo-random octets for a seed."""
    text, blocks = to_sixbit(seed), []
    for number in range(-(-length // HASH_OCTETS)):
        counter = b"%dL" % number if number else b"0"
        values: Value = {b"seed": text, b"diversifier": counter}
        blocks.append(sha1(encode({b"input values for generating pseudo-random output": values})))
    return b"".join(blocks)[:length]


def xor(octets: bytes, mask: bytes) -> bytes:
    """XOR of two strings of one length."""
    return (int.from_bytes(octets, "big") ^ int.from_bytes(mask, "big")).to_bytes(len(octets), "big")


_LABEL_HASH = sha1(b"")


def oaep_encode(message: bytes, seed: bytes, length: int = PADDED_OCTETS) -> bytes:
    """Pad a message to `length` octets; `seed` are 20 random octets."""
    zeros = length - len(message) - 2 * HASH_OCTETS - 1
    if zeros < 0 or len(seed) != HASH_OCTETS:
        raise LocalProtocolError(f"OAEP of {len(message)} bytes with a seed of {len(seed)} does not fit into {length}")
    block = _LABEL_HASH + bytes(zeros) + b"\1" + message
    masked_block = xor(block, sha_random(seed, len(block)))
    return xor(seed, sha_random(masked_block, HASH_OCTETS)) + masked_block


def oaep_decode(padded: bytes) -> bytes:
    """The message in a padded block. Raises `RemoteProtocolError` for anything that `oaep_encode` does not make.

    All checks are made, whichever fails, so that the time tells little about the block.
    """
    if len(padded) <= 2 * HASH_OCTETS:
        raise RemoteProtocolError("OAEP padding is wrong")
    masked_seed, masked_block = padded[:HASH_OCTETS], padded[HASH_OCTETS:]
    seed = xor(masked_seed, sha_random(masked_block, HASH_OCTETS))
    block = xor(masked_block, sha_random(seed, len(masked_block)))
    same_label = hmac.compare_digest(block[:HASH_OCTETS], _LABEL_HASH)
    rest = block[HASH_OCTETS:].lstrip(b"\0")
    if not same_label & (rest[:1] == b"\1"):
        raise RemoteProtocolError("OAEP padding is wrong")
    return rest[1:]


def desx_encrypt(key: bytes, iv: bytes, plaintext: bytes) -> bytes:
    """E: encrypt more than 8 octets; the ciphertext is as long."""
    return finish(desx_encrypting(key, iv, plaintext))


def desx_decrypt(key: bytes, iv: bytes, ciphertext: bytes) -> bytes:
    """Decrypt what E encrypted. Raises `RemoteProtocolError` if it is too short; nothing else is checked here."""
    return finish(desx_decrypting(key, iv, ciphertext))


def desx_encrypting(key: bytes, iv: bytes, plaintext: bytes) -> Steps[bytes]:
    """`desx_encrypt` in steps."""
    if len(plaintext) <= BLOCK_OCTETS:
        raise LocalProtocolError(f"DESX with ciphertext stealing needs more than {BLOCK_OCTETS} bytes")
    padded = plaintext + bytes(-len(plaintext) % BLOCK_OCTETS)
    last = len(plaintext) - len(padded) + BLOCK_OCTETS  # octets of the last block, 1 to 8
    blocks = yield from _desx_cbc(key, iv, padded, encrypts=True)
    return blocks[: -2 * BLOCK_OCTETS] + blocks[-BLOCK_OCTETS:] + blocks[-2 * BLOCK_OCTETS : -BLOCK_OCTETS][:last]


def desx_decrypting(key: bytes, iv: bytes, ciphertext: bytes) -> Steps[bytes]:
    """`desx_decrypt` in steps."""
    if len(ciphertext) <= BLOCK_OCTETS:
        raise RemoteProtocolError(f"DESX ciphertext has no more than {BLOCK_OCTETS} bytes")
    stolen_at = len(ciphertext) - ((len(ciphertext) - 1) % BLOCK_OCTETS + 1)
    stolen, last_block = ciphertext[stolen_at:], ciphertext[stolen_at - BLOCK_OCTETS : stolen_at]
    of_last = finish(_desx_cbc(key, bytes(BLOCK_OCTETS), last_block, encrypts=False))
    blocks = ciphertext[: stolen_at - BLOCK_OCTETS] + stolen + of_last[len(stolen) :] + last_block
    plaintext = yield from _desx_cbc(key, iv, blocks, encrypts=False)
    return plaintext[: len(ciphertext)]


def _desx_cbc(key: bytes, iv: bytes, blocks: bytes, *, encrypts: bool) -> Steps[bytes]:
    before, inner, after = key[:8], key[8:16], key[16:]
    first_mask, last_mask = (xor(before, after), after) if encrypts else (after, xor(before, after))
    cipher = Cipher(TripleDES(inner * 3), CBC(xor(iv, after)))
    context = cipher.encryptor() if encrypts else cipher.decryptor()
    pieces = []
    for start in range(0, len(blocks), PIECE):
        piece = blocks[start : start + PIECE]
        count = len(piece) // BLOCK_OCTETS
        pieces.append(xor(context.update(xor(piece, first_mask * count)), last_mask * count))
        yield len(piece)
    context.finalize()
    return b"".join(pieces)


def rsa_public(modulus: int, number: bytes) -> bytes:
    """RSA with the public exponent, on 128 octets. Raises `RemoteProtocolError` if the number is too large."""
    value = _below(modulus, number)
    return pow(value, PUBLIC_EXPONENT, modulus).to_bytes(RSA_OCTETS, "big")


def rsa_private(modulus: int, exponent: int, number: bytes) -> bytes:
    """RSA with the private exponent, on 128 octets. Raises `RemoteProtocolError` if the number is too large.

    The time of Python's `pow` depends on its operands, so the number is blinded: multiplied by the cube of a secret
    number that only the key's owner can compute, and the result divided by that.
    """
    value = _below(modulus, number)
    secret = exponent.to_bytes(RSA_OCTETS, "big")
    halves = [hmac.digest(secret, half + number, "sha512") for half in (b"\0", b"\1")]
    blind = int.from_bytes(b"".join(halves), "big") % (modulus - 2) + 2
    blinded = value * pow(blind, PUBLIC_EXPONENT, modulus) % modulus
    return (pow(blinded, exponent, modulus) * pow(blind, -1, modulus) % modulus).to_bytes(RSA_OCTETS, "big")


def _below(modulus: int, number: bytes) -> int:
    value = int.from_bytes(number, "big")
    if len(number) != RSA_OCTETS or value >= modulus:
        raise RemoteProtocolError("RSA number is not below the modulus")
    return value
