"""The two toy keys of vectors.txt, and sources of random octets that a test can foresee."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable

from tests.wire.egtp.test_vectors import VECTORS
from tunneld.wire.egtp.mesgen.keys import ClassicKey, ClassicPublicKey


def octets(name: str) -> bytes:
    """The octets of a vector."""
    return bytes.fromhex(VECTORS[name])


def key(name: str) -> ClassicKey:
    """The key A or B."""
    numbers = [int.from_bytes(octets(f"key {name} {part}"), "big") for part in "nd"]
    return ClassicKey(ClassicPublicKey(numbers[0]), numbers[1])


A, B = key("A"), key("B")


def counted() -> Callable[[int], bytes]:
    """A source of octets that differ each time and are the same in every run."""
    count = 0

    def random(length: int) -> bytes:
        nonlocal count
        count += 1
        return hashlib.shake_128(b"%d" % count).digest(length)

    return random


def given(values: Iterable[bytes]) -> Callable[[int], bytes]:
    """A source of these octets, in this order."""
    left = iter(values)

    def random(length: int) -> bytes:
        value = next(left)
        assert len(value) == length
        return value

    return random
