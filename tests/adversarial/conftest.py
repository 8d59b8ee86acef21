"""What attacks on ports with TLS need."""

from __future__ import annotations

import pytest

from tests.support.papers import Papers


@pytest.fixture(scope="session")
def papers(tmp_path_factory: pytest.TempPathFactory) -> Papers:
    """A relay's certificate."""
    return Papers.issue(tmp_path_factory.mktemp("papers"))
