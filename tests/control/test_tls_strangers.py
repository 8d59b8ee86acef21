"""Strangers on the control socket in TLS: a handshake is a part of proving who one is."""

from __future__ import annotations

import ssl

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.auth.test_preauth import FOE, FRIEND, HOME, LONG, authenticator_with, client_from
from tests.control.test_auth import log_in
from tests.support.control import LineClient, Server, running_server
from tests.support.papers import Papers
from tests.support.people import connect, is_dropped, read_all
from tunneld.auth.authenticator import Authenticator
from tunneld.auth.preauth import PreauthLimiter, PreauthReason
from tunneld.config.schema import ControlSettings
from tunneld.tls import contexts


@pytest.fixture(scope="module")
def papers(tmp_path_factory: pytest.TempPathFactory) -> Papers:
    return Papers.issue(tmp_path_factory.mktemp("papers"))


async def encrypted_client(server: Server, papers: Papers, source: str) -> LineClient:
    client = LineClient(
        trio.SSLStream(await connect(server.endpoint, source), papers.client, server_hostname="127.0.0.1")
    )
    assert (await client.read_line()).endswith("auth=scram-sha-256")
    return client


# Strangers


async def test_a_handshake_is_a_stranger_and_who_is_refused_hears_nothing_in_clear(papers: Papers) -> None:
    settings = ControlSettings(max_startups="2:100:2")
    authenticator = authenticator_with(settings)
    async with running_server(settings, papers.server, authenticator=authenticator) as server:
        known = await encrypted_client(server, papers, HOME)
        assert (await log_in(known)).startswith("OK")
        assert len(authenticator.preauth) == 0
        await connect(server.endpoint)  # says nothing
        await encrypted_client(server, papers, HOME)  # does not authenticate
        assert await read_all(await connect(server.endpoint)) == b""
        assert await known.request("echo hi") == "OK hi"
        assert authenticator.preauth.refusals == {PreauthReason.STARTUPS: 1}


@pytest.mark.parametrize("said", [b"\x16" + b"x" * 500, b"GET / HTTP/1.1\r\n\r\n"])
async def test_what_is_no_handshake_is_a_failure(papers: Papers, said: bytes) -> None:
    settings = ControlSettings()
    authenticator = authenticator_with(settings)
    async with running_server(settings, papers.server, authenticator=authenticator) as server:
        for _ in range(3):
            client = await client_from(server, FOE)
            await client.send(said)
            await client.read_all()
            await client.stream.aclose()
            await wait_all_tasks_blocked(0.005)
        assert authenticator.preauth.penalised(trio.current_time()) == 1
        assert await is_dropped(await connect(server.endpoint, FOE))
        await encrypted_client(server, papers, FRIEND)


async def test_who_gives_up_in_the_middle_of_a_handshake_has_failed_nothing(papers: Papers) -> None:
    """An agent does, when the relay hangs for longer than it waits."""
    settings = ControlSettings()
    authenticator = authenticator_with(settings)
    hello = ssl.MemoryBIO()
    handshake = papers.client.wrap_bio(ssl.MemoryBIO(), hello, server_hostname="127.0.0.1")
    with pytest.raises(ssl.SSLWantReadError):
        handshake.do_handshake()
    said = hello.read()
    async with running_server(settings, papers.server, authenticator=authenticator) as server:
        for _ in range(5):
            client = await client_from(server, FOE)
            await client.stream.send_all(said)
            await client.stream.aclose()
            await wait_all_tasks_blocked(0.005)
        assert authenticator.penalty(FOE) == 0.0


async def test_a_slow_handshake_is_a_failure_and_a_probe_is_none(papers: Papers, mock_clock: MockClock) -> None:
    settings = ControlSettings(handshake_timeout=10.0)
    authenticator = authenticator_with(settings)
    async with running_server(settings, papers.server, patience=LONG, authenticator=authenticator) as server:
        slow = [await connect(server.endpoint, FOE) for _ in range(3)]
        for _ in range(5):
            await (await connect(server.endpoint, FRIEND)).aclose()
        await wait_all_tasks_blocked(0.005)
        assert authenticator.penalty(FRIEND) == 0.0
        mock_clock.jump(11)
        for stream in slow:
            assert await is_dropped(stream)
        await wait_all_tasks_blocked(0.005)
        assert authenticator.penalty(FOE) == 5.0
        assert len(authenticator.preauth) == 0


async def test_tls_that_asks_nobody_who_they_are_has_no_strangers(papers: Papers) -> None:
    settings = ControlSettings(max_startups="1:100:1")
    authenticator = Authenticator(lambda: (), PreauthLimiter(lambda: settings))
    async with running_server(settings, papers.server, authenticator=authenticator) as server:
        for _ in range(5):
            await connect(server.endpoint)
        client = LineClient(trio.SSLStream(await connect(server.endpoint), papers.client, server_hostname="127.0.0.1"))
        assert (await client.read_line()).endswith("auth=none")


async def test_a_certificate_that_is_asked_for_makes_strangers_and_ends_being_one(papers: Papers) -> None:
    settings = ControlSettings(max_startups="1:100:1")
    authenticator = Authenticator(lambda: (), PreauthLimiter(lambda: settings))
    async with running_server(settings, papers.mutual, authenticator=authenticator) as server:
        context = contexts.client_tls_context(papers.folder / "ca.pem", papers.folder / "client.pem")
        known = LineClient(trio.SSLStream(await connect(server.endpoint), context, server_hostname="127.0.0.1"))
        assert (await known.read_line()).startswith("OK tunneld")
        assert len(authenticator.preauth) == 0
        await connect(server.endpoint)
        assert await read_all(await connect(server.endpoint)) == b""
        assert authenticator.preauth.refusals == {PreauthReason.STARTUPS: 1}
