"""Fixtures of the adversarial tests."""

from __future__ import annotations

import pytest

from tests.support.papers import Papers


@pytest.fixture(scope="session")
def papers(tmp_path_factory: pytest.TempPathFactory) -> Papers:
    """Certificates for the relay and a client."""
    return Papers.issue(tmp_path_factory.mktemp("papers"))
