"""A TLS session that goes on in the next connection, where both ends still know it."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest
import trio

from tests.agent.support import BACKEND, PATIENCE, SECURE, RecordingReporter, echo, exposed, local_server, relay_here
from tests.agent.test_expose import address, ask
from tests.engine.bench import tcp_pair
from tests.support.papers import Papers
from tunneld.agent.handshake_pool import HandshakePool
from tunneld.errors import RemoteProtocolError
from tunneld.tls.connection import TlsSocket
from tunneld.tls.contexts import client_tls_context


@pytest.fixture(scope="module")
def papers(tmp_path_factory: pytest.TempPathFactory) -> Papers:
    return Papers.issue(tmp_path_factory.mktemp("papers"))


async def connected(server: ssl.SSLContext, client: ssl.SSLContext, session: ssl.SSLSession | None = None) -> TlsSocket:
    """The client's end of a connection on which the server has said OK."""
    near, far = tcp_pair()
    ours = TlsSocket(far, client, server_hostname="localhost", session=session)
    theirs = TlsSocket(near, server, server_side=True)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ours.shake_hands)
            nursery.start_soon(theirs.shake_hands)
        await theirs.send_all(b"OK")
        assert await ours.receive(2) == b"OK"
    finally:
        theirs.close()
        ours.close()
    return ours


def went_on(connection: TlsSocket) -> bool:
    """Whether it began with the session of another."""
    return bool(connection._tls.session_reused)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_the_next_connection_begins_where_the_last_one_was(papers: Papers, version: ssl.TLSVersion) -> None:
    server, client = papers.server, papers.client
    client.maximum_version = version
    first = await connected(server, client)
    session = first.session(None)
    second = await connected(server, client, session)
    assert (went_on(first), went_on(second)) == (False, True)
    assert second.session(session) is session, "and the one after that, too"
    assert went_on(await connected(server, client, session))


async def test_a_server_that_was_started_again_shakes_hands_as_with_a_stranger(papers: Papers) -> None:
    client = papers.client
    session = (await connected(papers.server, client)).session(None)
    other = await connected(papers.server, client, session)
    assert not went_on(other)
    assert other.session(session) is not session


async def test_who_stands_in_the_place_of_a_pinned_server_does_not_pass_with_its_session(
    papers: Papers, tmp_path: Path
) -> None:
    client = client_tls_context(pin=papers.pin)
    session = (await connected(papers.server, client)).session(None)
    with pytest.RaisesGroup(RemoteProtocolError, allow_unwrapped=True, flatten_subgroups=True):
        await connected(Papers.issue(tmp_path / "impostor").server, client, session)


async def test_a_server_that_asks_for_a_certificate_knows_it_again(papers: Papers) -> None:
    server, client = papers.mutual, client_tls_context(papers.folder / "ca.pem", papers.folder / "client.pem")
    session = (await connected(server, client)).session(None)
    assert went_on(await connected(server, client, session))


async def test_parked_connections_of_a_tunnel_share_a_session(papers: Papers) -> None:
    tokens, told = (BACKEND.set("tcp"), SECURE.set(papers)), RecordingReporter()
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
