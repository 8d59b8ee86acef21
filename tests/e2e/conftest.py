"""Fixtures of the end-to-end tests."""

from __future__ import annotations

import pytest

from tests.support.exposed import VARIANTS


@pytest.fixture(params=VARIANTS)
def way(request: pytest.FixtureRequest) -> str:
    """Each backend, with and without TLS; see `tests.support.exposed`."""
    return str(request.param)
