"""Unauthenticated connections on the control port with TLS: the handshake is part of the authentication."""

from __future__ import annotations

import math
import ssl

import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.auth.test_preauth import ATTACKER, EXEMPT, LONG, OTHER, authenticator_with, client_from
from tests.control.test_login import log_in
from tests.support.control import LineClient, Server, running_server
from tests.support.peers import connect, is_dropped, read_all
from tests.support.pki import Pki
from tunneld.auth.authenticator import PREAUTH_LOG_RATE, Authenticator
from tunneld.auth.preauth import PreauthLimiter, PreauthReason
from tunneld.config.schema import ControlSettings
from tunneld.tls import contexts


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki.issue(tmp_path_factory.mktemp("pki"))


async def encrypted_client(server: Server, pki: Pki, source: str) -> LineClient:
    client = LineClient(trio.SSLStream(await connect(server.endpoint, source), pki.client, server_hostname="127.0.0.1"))
    assert (await client.read_line()).endswith("auth=scram-sha-256")
    return client


async def test_a_handshake_takes_a_place_and_a_refusal_is_one_line_of_plain_text(pki: Pki) -> None:
    settings = ControlSettings(max_startups="2:100:2")
    authenticator = authenticator_with(settings)
    async with running_server(settings, pki.server, authenticator=authenticator) as server:
        authenticated = await encrypted_client(server, pki, EXEMPT)
        assert (await log_in(authenticated)).startswith("OK")
        assert len(authenticator.preauth) == 0
        await connect(server.endpoint)  # sends nothing
        await encrypted_client(server, pki, EXEMPT)  # does not authenticate
        refusal = b"ERR limit 2 connections have not authenticated yet (control.max_startups); try again later\n"
        assert await read_all(await connect(server.endpoint)) == refusal
        assert await authenticated.request("echo hi") == "OK hi"
        assert authenticator.preauth.refusals == {PreauthReason.STARTUPS: 1}


@pytest.mark.parametrize("sent", [b"\x16" + b"x" * 500, b"GET / HTTP/1.1\r\n\r\n"])
async def test_anything_but_a_handshake_is_a_failure(pki: Pki, sent: bytes) -> None:
    settings = ControlSettings()
    authenticator = authenticator_with(settings)
    async with running_server(settings, pki.server, authenticator=authenticator) as server:
        for _ in range(3):
            client = await client_from(server, ATTACKER)
            await client.send(sent)
            await client.read_all()
            await client.stream.aclose()
            await wait_all_tasks_blocked(0.005)
        assert authenticator.preauth.penalised(trio.current_time()) == 1
        refused = await read_all(await connect(server.endpoint, ATTACKER))
        assert refused == b"ERR limit this address is blocked for 5 s after failed logins from it\n"
        await encrypted_client(server, pki, OTHER)


@pytest.mark.parametrize(("times", "penalty"), [(7, 0.0), (8, 5.0)])
async def test_closing_during_a_handshake_is_a_failure_where_it_becomes_usual(
    pki: Pki, times: int, penalty: float
) -> None:
    """An agent does this now and then, when the relay takes longer than the agent waits."""
    settings = ControlSettings(abandoned_handshakes="5/h")
    authenticator = authenticator_with(settings)
    hello = ssl.MemoryBIO()
    handshake = pki.client.wrap_bio(ssl.MemoryBIO(), hello, server_hostname="127.0.0.1")
    with pytest.raises(ssl.SSLWantReadError):
        handshake.do_handshake()
    client_hello = hello.read()
    async with running_server(settings, pki.server, authenticator=authenticator) as server:
        for _ in range(times):
            client = await client_from(server, ATTACKER)
            await client.stream.send_all(client_hello)
            await client.stream.aclose()
            await wait_all_tasks_blocked(0.005)
        assert math.ceil(authenticator.penalty(ATTACKER)) == penalty


async def test_a_login_that_is_abandoned_after_the_handshake_counts_as_such(pki: Pki) -> None:
    settings = ControlSettings(abandoned_handshakes="5/h")
    authenticator = authenticator_with(settings)
    async with running_server(settings, pki.server, authenticator=authenticator) as server:
        for _ in range(20):
            client = await encrypted_client(server, pki, OTHER)
            assert (await log_in(client)).startswith("OK")
            await client.stream.aclose()
        for _ in range(8):
            await (await encrypted_client(server, pki, ATTACKER)).stream.aclose()
            await wait_all_tasks_blocked(0.005)
        assert (authenticator.penalty(ATTACKER) > 0, authenticator.penalty(OTHER)) == (True, 0.0)


async def test_a_slow_handshake_is_a_failure_and_a_probe_is_none(pki: Pki, mock_clock: MockClock) -> None:
    settings = ControlSettings(handshake_timeout=10.0)
    authenticator = authenticator_with(settings)
    async with running_server(settings, pki.server, timeout=LONG, authenticator=authenticator) as server:
        slow = [await connect(server.endpoint, ATTACKER) for _ in range(3)]
        for _ in range(5):
            await (await connect(server.endpoint, OTHER)).aclose()
        await wait_all_tasks_blocked(0.005)
        assert authenticator.penalty(OTHER) == 0.0
        mock_clock.jump(11)
        for stream in slow:
            assert await is_dropped(stream)
        await wait_all_tasks_blocked(0.005)
        assert authenticator.penalty(ATTACKER) == 5.0
        assert len(authenticator.preauth) == 0


async def test_tls_without_authentication_needs_no_place(pki: Pki) -> None:
    settings = ControlSettings(max_startups="1:100:1")
    authenticator = Authenticator(lambda: (), PreauthLimiter(lambda: settings))
    async with running_server(settings, pki.server, authenticator=authenticator) as server:
        for _ in range(5):
            await connect(server.endpoint)
        client = LineClient(trio.SSLStream(await connect(server.endpoint), pki.client, server_hostname="127.0.0.1"))
        assert (await client.read_line()).endswith("auth=none")


async def test_a_required_certificate_takes_a_place_until_it_is_verified(pki: Pki) -> None:
    settings = ControlSettings(max_startups="1:100:1")
    authenticator = Authenticator(lambda: (), PreauthLimiter(lambda: settings))
    async with running_server(settings, pki.mutual, authenticator=authenticator) as server:
        context = contexts.client_tls_context(pki.folder / "ca.pem", pki.folder / "client.pem")
        authenticated = LineClient(trio.SSLStream(await connect(server.endpoint), context, server_hostname="127.0.0.1"))
        assert (await authenticated.read_line()).startswith("OK tunneld")
        assert len(authenticator.preauth) == 0
        await connect(server.endpoint)
        assert (await read_all(await connect(server.endpoint))).startswith(b"ERR limit 1 connections have not auth")
        assert authenticator.preauth.refusals == {PreauthReason.STARTUPS: 1}


@pytest.mark.parametrize(
    ("encrypted", "sent"),
    [(True, b"GET / HTTP/1.1\r\n\r\n"), (True, b"\x16" + b"x" * 500), (False, b"GET / HTTP/1.1\r\n\r\n")],
)
async def test_peers_that_do_not_speak_the_protocol_do_not_flood_the_log(
    pki: Pki, encrypted: bool, sent: bytes
) -> None:
    settings = ControlSettings()
    authenticator = authenticator_with(settings)
    async with running_server(settings, pki.server if encrypted else None, authenticator=authenticator) as server:
        with capture_logs() as logs:
            for _ in range(30):
                client = await client_from(server, EXEMPT)
                await client.send(sent)
                await client.read_all()
                await client.stream.aclose()
    assert len([log for log in logs if log["log_level"] != "debug"]) == PREAUTH_LOG_RATE.count


async def test_connections_beyond_the_limit_do_not_flood_the_log() -> None:
    settings = ControlSettings(max_connections=1)
    async with running_server(settings) as server:
        with capture_logs() as logs:
            for _ in range(30):
                async with server.client():
                    assert (await (await client_from(server, OTHER)).read_line()).startswith("ERR limit 1 of 1")
                await wait_all_tasks_blocked(0.001)
    limits = [log for log in logs if log["event"] == "control connection limit reached"]
    assert len(limits) == PREAUTH_LOG_RATE.count
