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


@pytest.fixture(params=["plain", "tls", "private"])
async def pair(request: pytest.FixtureRequest, carrier_certificates: Pki) -> AsyncIterator[CarrierPair]:
    """Two carriers, on a plain and on a TLS connection, and inside the TLS of a private tunnel. No descriptor may be
    left open after the test.
    """
    before = open_descriptors()
    marker = request.node.get_closest_marker("limits")
    limits = CarrierLimits(**marker.kwargs) if marker else None
    certificates = carrier_certificates if request.param == "tls" else None
    async with carrier_pair(certificates, limits, over_ends=request.param == "private") as pair:
        yield pair
    assert open_descriptors() == before
