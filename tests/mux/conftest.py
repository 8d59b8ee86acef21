"""Fixtures of the carriers' tests."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.engine.bench import open_descriptors
from tests.mux.bench import Two, two_carriers
from tests.support.papers import Papers
from tunneld.mux.limits import CarrierLimits


@pytest.fixture(scope="session")
def carrier_papers(tmp_path_factory: pytest.TempPathFactory) -> Papers:
    """A relay's certificate."""
    return Papers.issue(tmp_path_factory.mktemp("papers"))


@pytest.fixture(params=["plain", "tls"])
async def two(request: pytest.FixtureRequest, carrier_papers: Papers) -> AsyncIterator[Two]:
    """Two carriers, in each kind of link; as many descriptors after the test as before."""
    before = open_descriptors()
    marker = request.node.get_closest_marker("limits")
    limits = CarrierLimits(**marker.kwargs) if marker else None
    async with two_carriers(carrier_papers if request.param == "tls" else None, limits) as two:
        yield two
    assert open_descriptors() == before
