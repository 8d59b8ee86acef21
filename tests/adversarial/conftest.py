"""Fixtures of the adversarial tests."""

from __future__ import annotations

import pytest

from tests.support.pki import Pki


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    """Certificates for the relay and a client."""
    return Pki.issue(tmp_path_factory.mktemp("pki"))
