"""Session resumption: the next connection skips the full handshake if both ends still know the session."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest
import trio

from tests.agent.support import BACKEND, PATIENCE, SECURE, RecordingReporter, echo, exposed, local_server, relay_here
from tests.agent.test_expose import address, ask
from tests.engine.bench import tcp_pair
from tests.support.pki import Pki
from tunneld.agent.handshake_pool import HandshakePool
from tunneld.errors import RemoteProtocolError
from tunneld.tls.connection import TlsSocket
from tunneld.tls.contexts import client_tls_context


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki.issue(tmp_path_factory.mktemp("pki"))


async def connected(server: ssl.SSLContext, client: ssl.SSLContext, session: ssl.SSLSession | None = None) -> TlsSocket:
    """The client's end of a connection on which the server has sent OK."""
    near, far = tcp_pair()
    client_end = TlsSocket(far, client, server_hostname="localhost", session=session)
    server_end = TlsSocket(near, server, server_side=True)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client_end.shake_hands)
            nursery.start_soon(server_end.shake_hands)
        await server_end.send_all(b"OK")
        assert await client_end.receive(2) == b"OK"
    finally:
        server_end.close()
        client_end.close()
    return client_end


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_the_next_connection_resumes_the_session(pki: Pki, version: ssl.TLSVersion) -> None:
    server, client = pki.server, pki.client
    client.maximum_version = version
    first = await connected(server, client)
    session = first.session(None)
    second = await connected(server, client, session)
    assert (first.session_reused, second.session_reused) == (False, True)
    assert second.session(session) is session, "the connection after that can resume it too"
    assert (await connected(server, client, session)).session_reused


async def test_a_restarted_server_does_a_full_handshake(pki: Pki) -> None:
    client = pki.client
    session = (await connected(pki.server, client)).session(None)
    other = await connected(pki.server, client, session)
    assert not other.session_reused
    assert other.session(session) is not session


async def test_an_impostor_of_a_pinned_server_is_refused_even_with_a_session(pki: Pki, tmp_path: Path) -> None:
    client = client_tls_context(pin=pki.pin)
    session = (await connected(pki.server, client)).session(None)
    with pytest.RaisesGroup(RemoteProtocolError, allow_unwrapped=True, flatten_subgroups=True):
        await connected(Pki.issue(tmp_path / "impostor").server, client, session)


async def test_a_session_with_a_client_certificate_is_resumed(pki: Pki) -> None:
    server, client = pki.mutual, client_tls_context(pki.folder / "ca.pem", pki.folder / "client.pem")
    session = (await connected(server, client)).session(None)
    assert (await connected(server, client, session)).session_reused


async def test_parked_connections_of_a_tunnel_share_a_session(pki: Pki) -> None:
    tokens, told = (BACKEND.set("tcp"), SECURE.set(pki)), RecordingReporter()
    with trio.fail_after(PATIENCE):
        async with (
            relay_here() as relay,
            local_server(echo) as target,
            exposed(target, relay.access, told) as exposure,
        ):
            assert exposure.session is not None
            pool = exposure.session.source
            assert isinstance(pool, HandshakePool)
            for _ in range(20):
                assert await ask(address(told), b"hello") == b"hello"
            session = pool.tls_session
            assert session is not None
            for _ in range(20):
                assert await ask(address(told), b"hello") == b"hello"
            assert pool.tls_session is session, "each went on with it"
    BACKEND.reset(tokens[0])
    SECURE.reset(tokens[1])
