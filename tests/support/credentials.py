"""Credentials for tests, cheap to check, and an authenticator for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest

from tunneld.auth.authenticator import Authenticator
from tunneld.config.credentials import Credential
from tunneld.wire import verifier
from tunneld.wire.verifier import MIN_ITERATIONS, derive

SECRET = "correct horse battery"


def credential(name: str, secret: str = SECRET, **keys: Any) -> Credential:
    """A credential with the minimum of iterations; a user unless `role` is given."""
    return Credential(name=name, verifier=derive(secret, f"salt of {name}".encode(), MIN_ITERATIONS), **keys)


def authenticator_of(*credentials: Credential) -> Authenticator:
    """An authenticator with these credentials."""
    return Authenticator(lambda: credentials)


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch, name: str, module: ModuleType = verifier) -> Iterator[list[int]]:
    """Count the calls of a function: the yielded list has an element for each."""
    calls: list[int] = []
    real = getattr(module, name)

    def count(*args: Any) -> Any:
        calls.append(1)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, count)
        yield calls
