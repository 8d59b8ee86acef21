"""What end-to-end tests can ask for."""

from __future__ import annotations

import pytest

from tests.support.ways import WAYS


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    """Each way from a visitor to a hidden server, see `tests.support.ways`."""
    return str(request.param)
