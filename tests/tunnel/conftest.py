"""A service with a tunnel for each way in which a hidden server presents a key: none, in plain text, in TLS."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import trio

from tests.support.keyed import open_lobby
from tests.support.papers import Papers
from tests.tunnel.support import PAPERS, SECURE
from tunneld.auth.handshakes import HandshakeSupervisor
from tunneld.backends import BACKENDS
from tunneld.config.schema import Settings, TunnelSettings
from tunneld.directory.service import TunnelService
from tunneld.engine.engine import Engine


@pytest.fixture(scope="session")
def papers(tmp_path_factory: pytest.TempPathFactory) -> Papers:
    return Papers.issue(tmp_path_factory.mktemp("papers"))


@pytest.fixture(params=["no", "key", "yes"], ids=["plain", "key", "tls"])
def secure(request: pytest.FixtureRequest, papers: Papers) -> Iterator[Papers]:
    tokens = SECURE.set(request.param), PAPERS.set(papers)
    yield papers
    SECURE.reset(tokens[0])
    PAPERS.reset(tokens[1])


@pytest.fixture
async def handshakes(nursery: trio.Nursery, papers: Papers) -> HandshakeSupervisor:
    return await open_lobby(nursery, papers)


@pytest.fixture
async def each_way(
    nursery: trio.Nursery,
    engine: Engine,
    tunnel_settings: TunnelSettings,
    handshakes: HandshakeSupervisor,
    secure: Papers,
) -> TunnelService:
    """A running service on loopback, once for each way in which a hidden server presents a key."""
    service = TunnelService(lambda: Settings(tunnels=tunnel_settings), engine, BACKENDS, handshakes=handshakes)
    await nursery.start(service.run)
    return service
