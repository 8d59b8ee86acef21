"""Fixtures of the end-to-end tests."""

from __future__ import annotations

import pytest

from tests.support.ways import WAYS


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    """Each backend, with and without TLS; see `tests.support.ways`."""
    return str(request.param)
