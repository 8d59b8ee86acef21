"""Fixtures of the agent's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.agent.support import BACKEND


@pytest.fixture(params=["tcp", "webmux"])
def each_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The relays of the test have this backend, and the agent uses it."""
    token = BACKEND.set(request.param)
    yield request.param
    BACKEND.reset(token)
