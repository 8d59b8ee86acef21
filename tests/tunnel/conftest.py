"""A service with a tunnel for each way in which a hidden server presents a key: none, in plain text, in TLS."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import trio

from tests.support.hidden_servers import start_handshakes
from tests.support.pki import Pki
from tests.tunnel.support import PKI, SECURE
from tunneld.auth.handshakes import HandshakeSupervisor
from tunneld.backends import BACKENDS
from tunneld.config.schema import ControlSettings, Settings, TunnelSettings
from tunneld.directory.service import TunnelService
from tunneld.engine.engine import Engine


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki.issue(tmp_path_factory.mktemp("pki"))


@pytest.fixture(params=["no", "key", "yes"], ids=["plain", "key", "tls"])
def secure(request: pytest.FixtureRequest, pki: Pki) -> Iterator[Pki]:
    tokens = SECURE.set(request.param), PKI.set(pki)
    yield pki
    SECURE.reset(tokens[0])
    PKI.reset(tokens[1])


@pytest.fixture
async def handshakes(nursery: trio.Nursery, pki: Pki) -> HandshakeSupervisor:
    return await start_handshakes(nursery, pki)


@pytest.fixture
async def each_way(
    nursery: trio.Nursery,
    engine: Engine,
    tunnel_settings: TunnelSettings,
    handshakes: HandshakeSupervisor,
    secure: Pki,
) -> TunnelService:
    """A running service on loopback, once for each way in which a hidden server presents a key."""
    settings = Settings(tunnels=tunnel_settings, control=ControlSettings(credential_share=1.0))  # ranges are tiny
    service = TunnelService(lambda: settings, engine, BACKENDS, handshakes=handshakes)
    await nursery.start(service.run)
    return service
