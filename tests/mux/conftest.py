"""Fixtures of the carriers' tests."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.engine.bench import open_descriptors
from tests.mux.bench import CarrierPair, carrier_pair
from tests.support.pki import Pki
from tunneld.mux.limits import CarrierLimits


@pytest.fixture(scope="session")
def carrier_certificates(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    """The relay's certificate and its authority."""
    return Pki.issue(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(params=["plain", "tls"])
async def pair(request: pytest.FixtureRequest, carrier_certificates: Pki) -> AsyncIterator[CarrierPair]:
    """Two carriers, on a plain and on a TLS connection. No descriptor may be left open after the test."""
    before = open_descriptors()
    marker = request.node.get_closest_marker("limits")
    limits = CarrierLimits(**marker.kwargs) if marker else None
    async with carrier_pair(carrier_certificates if request.param == "tls" else None, limits) as pair:
        yield pair
    assert open_descriptors() == before
