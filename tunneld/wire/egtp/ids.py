"""Ids of EGTP, and mojosixbit, the text form of octets. Pure.

The id of anything is the SHA-1 of its encoding: 20 octets. A node's id is the id of its mencoded public key, a
message's id that of the mencoded message. mojosixbit is base64 with `-` and `_` and without padding, so an id has 27
characters. Only canonical text is accepted: the unused bits of the last character are zero.

Messages contain ids in either form ("sloppy" ids in the original). `read_id` accepts both; an id as text and an id as
octets have different lengths, so there is no doubt.
"""

from __future__ import annotations

import base64
import binascii
import hashlib

from tunneld.errors import RemoteProtocolError

ID_OCTETS = 20
ID_CHARACTERS = 27


def id_of(encoded: bytes) -> bytes:
    """The id of something, by its encoding."""
    return hashlib.sha1(encoded, usedforsecurity=False).digest()


def to_sixbit(octets: bytes) -> bytes:
    """The text form of octets, in ASCII."""
    return base64.urlsafe_b64encode(octets).rstrip(b"=")


def from_sixbit(text: bytes) -> bytes:
    """The octets whose text form this is. Raises `RemoteProtocolError` if it is not canonical."""
    try:
        octets = base64.urlsafe_b64decode(text + b"=" * (-len(text) % 4))
    except binascii.Error:
        octets = b""
    if to_sixbit(octets) != text:  # the decoder ignores characters outside the alphabet, and unused bits
        raise RemoteProtocolError(f"not canonical mojosixbit: {ascii(text[:40])[1:]}")
    return octets


def id_text(identity: bytes) -> str:
    """The text form of an id, for people: `s3twl9lELuFe149E6B-RDUyS7OI`."""
    return to_sixbit(identity).decode()


def read_id(value: object) -> bytes:
    """The id in a message, which is 20 octets or 27 characters. Raises `RemoteProtocolError` for anything else."""
    if isinstance(value, bytes):
        if len(value) == ID_OCTETS:
            return value
        if len(value) == ID_CHARACTERS:
            return from_sixbit(value)
    raise RemoteProtocolError("not an id: an id has 20 octets, or 27 characters of mojosixbit")
