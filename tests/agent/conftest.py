"""Fixtures of the agent's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.agent.support import SECURE, using_backend
from tests.support.pki import Pki


@pytest.fixture(scope="session")
def relay_papers(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    """The certificate of a relay."""
    return Pki.issue(tmp_path_factory.mktemp("pki"))


@pytest.fixture(params=["tcp", "tcp in TLS", "webmux", "egtp"])
def each_backend(request: pytest.FixtureRequest, relay_papers: Pki) -> Iterator[str]:
    """Runs the test once per backend: its relays have it, and its agents use it."""
    name, _, secure = request.param.partition(" ")
    token = SECURE.set(relay_papers if secure else None)
    with using_backend(name):
        yield name
    SECURE.reset(token)
