"""HTTP over TLS: secrets from remote addresses, limits on unauthenticated connections, client certificates."""

from __future__ import annotations

import json
import ssl
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.http.support import HttpAnswer, HttpRelay, read_answer, running_http
from tests.support.credentials import SECRET, credential
from tests.support.peers import connect, is_dropped, read_all
from tests.support.pki import Pki
from tunneld.auth.authenticator import Authenticator
from tunneld.auth.preauth import PreauthLimiter
from tunneld.config.credentials import Credential
from tunneld.config.schema import ControlSettings
from tunneld.net.endpoint import Endpoint
from tunneld.tls import contexts
from tunneld.tls.connection import TlsSocket
from tunneld.tls.pins import fingerprint, subject
from tunneld.tls.stream import TlsStream

ALICE = credential("alice")
BASIC = f"Basic {b64encode(f'alice:{SECRET}'.encode()).decode()}"
WRONG = f"Basic {b64encode(b'alice:not the secret').decode()}"


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki.issue(tmp_path_factory.mktemp("pki"))


def strict(*credentials: Credential) -> Authenticator:
    """An authenticator that does not exempt loopback."""
    return Authenticator(lambda: credentials, PreauthLimiter(ControlSettings, exempt=lambda _host: False))


@pytest.fixture
async def relay(pki: Pki) -> AsyncIterator[HttpRelay]:
    async with running_http(authenticator=strict(ALICE), tls=pki.server) as relay:
        yield relay


async def encrypted(relay: HttpRelay, context: ssl.SSLContext) -> TlsStream:
    below = await connect(Endpoint("tcp", relay.host, relay.port))
    tls = TlsSocket(cast(Any, below.socket)._sock, context, server_hostname="localhost")
    await tls.shake_hands()
    return TlsStream(tls)


async def send_request(relay: HttpRelay, stream: TlsStream, authorization: str = "") -> HttpAnswer:
    lines = ["GET /api/v1/list HTTP/1.1", f"host: {relay.authority}"]
    lines += [f"authorization: {authorization}"] if authorization else []
    await stream.send_all("\r\n".join([*lines, "", ""]).encode())
    return await read_answer(stream)


async def test_a_program_with_the_ca_and_a_secret_is_admitted(relay: HttpRelay, pki: Pki) -> None:
    request = urllib.request.Request(f"https://localhost:{relay.port}/api/v1/list", headers={"Authorization": BASIC})

    def run() -> Any:
        with urllib.request.urlopen(request, context=pki.client) as answer:
            return json.load(answer)

    assert await trio.to_thread.run_sync(run) == {"text": "0 tunnels", "items": []}


async def test_a_secret_releases_the_slot_of_the_connection(relay: HttpRelay, pki: Pki) -> None:
    assert relay.authenticator is not None
    stream = await encrypted(relay, pki.client)
    assert (await send_request(relay, stream)).status == 401
    assert len(relay.authenticator.preauth) == 1
    assert (await send_request(relay, stream, BASIC)).status == 200
    assert len(relay.authenticator.preauth) == 0
    assert (await send_request(relay, stream, BASIC)).status == 200


async def test_failures_bring_a_penalty_for_this_connection_and_the_next(relay: HttpRelay, pki: Pki) -> None:
    stream = await encrypted(relay, pki.client)
    with capture_logs() as logs:
        answers = [(await send_request(relay, stream, WRONG)).status for _ in range(3)]
    assert answers == [401, 401, 401]
    assert [log["service"] for log in logs if log["event"] == "authentication failed"] == ["http"] * 3
    right = await send_request(relay, stream, BASIC)
    assert (right.status, right.headers["retry-after"]) == (429, "5")
    again = await send_request(relay, await encrypted(relay, pki.client), BASIC)
    assert again.json["detail"] == "this name is blocked for 5 s after failed logins with it from this address"


async def test_parallel_connections_allow_no_more_guesses_than_sequential_ones(relay: HttpRelay, pki: Pki) -> None:
    streams = [await encrypted(relay, pki.client) for _ in range(10)]
    statuses: list[int] = []

    async def guess(stream: TlsStream) -> None:
        statuses.append((await send_request(relay, stream, WRONG)).status)

    async with trio.open_nursery() as nursery:
        for stream in streams:
            nursery.start_soon(guess, stream)
    assert sorted(statuses) == [401] * 3 + [429] * 7


async def test_plain_http_gets_an_error(relay: HttpRelay) -> None:
    stream = await connect(Endpoint("tcp", relay.host, relay.port))
    await stream.send_all(b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n")
    answer = await read_all(stream)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.endswith(b"this port speaks https\n")


@pytest.mark.parametrize("sent", [b"", b"\x16\x03\x01\x02\x00"], ids=["nothing", "half a handshake"])
async def test_an_unfinished_handshake_has_a_deadline(pki: Pki, sent: bytes, mock_clock: MockClock) -> None:
    async with running_http(authenticator=strict(ALICE), tls=pki.server) as relay:
        assert relay.authenticator is not None
        stream = await connect(Endpoint("tcp", relay.host, relay.port))
        await stream.send_all(sent)
        while not len(relay.authenticator.preauth):
            await trio.lowlevel.checkpoint()
        await wait_all_tasks_blocked()
        mock_clock.jump(10)
        assert await is_dropped(stream)
        assert not len(relay.authenticator.preauth)


async def test_silence_after_the_handshake_has_the_same_deadline(pki: Pki, mock_clock: MockClock) -> None:
    async with running_http(authenticator=strict(ALICE), tls=pki.server) as relay:
        stream = await encrypted(relay, pki.client)
        await wait_all_tasks_blocked(0.05)
        mock_clock.jump(10)
        assert await stream.receive_some() == b""


async def test_probes_do_not_extend_the_deadline(pki: Pki, mock_clock: MockClock) -> None:
    """Once, keep-alive held a place for ever, and 128 idle connections kept every other client out."""
    async with running_http(authenticator=strict(ALICE), tls=pki.server) as relay:
        assert relay.authenticator is not None
        stream = await encrypted(relay, pki.client)
        for _ in range(3):
            await stream.send_all(f"GET /healthz HTTP/1.1\r\nhost: {relay.authority}\r\n\r\n".encode())
            assert (await read_answer(stream)).status == 200
            await wait_all_tasks_blocked(0.01)
            mock_clock.jump(3)
        assert len(relay.authenticator.preauth) == 1
        mock_clock.jump(1)
        await wait_all_tasks_blocked(0.05)
        assert len(relay.authenticator.preauth) == 0
        assert await stream.receive_some() == b""


async def test_pipelined_probes_do_not_extend_the_deadline(pki: Pki, mock_clock: MockClock) -> None:
    async with running_http(authenticator=strict(ALICE), tls=pki.server) as relay:
        stream = await encrypted(relay, pki.client)
        probe = f"GET /healthz HTTP/1.1\r\nhost: {relay.authority}\r\n\r\n".encode()

        async def flood() -> None:
            with suppress(trio.BrokenResourceError):
                while True:
                    await stream.send_all(20 * probe)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(flood)
            await stream.receive_some()
            mock_clock.jump(10)
            with suppress(trio.BrokenResourceError):
                while await stream.receive_some():
                    pass
            nursery.cancel_scope.cancel()


async def test_an_authenticated_connection_has_no_deadline(pki: Pki, mock_clock: MockClock) -> None:
    async with running_http(authenticator=strict(ALICE), tls=pki.server) as relay:
        stream = await encrypted(relay, pki.client)
        assert (await send_request(relay, stream, BASIC)).status == 200
        await wait_all_tasks_blocked(0.01)
        mock_clock.jump(8)
        assert (await send_request(relay, stream)).status == 401
        await wait_all_tasks_blocked(0.01)
        mock_clock.jump(8)
        assert (await send_request(relay, stream, BASIC)).status == 200


async def test_unauthenticated_connections_of_one_source_are_limited(relay: HttpRelay) -> None:
    endpoint = Endpoint("tcp", relay.host, relay.port)
    crowd = [await connect(endpoint) for _ in range(16)]
    assert await is_dropped(await connect(endpoint))
    for stream in crowd:
        await stream.aclose()


async def test_an_answer_larger_than_the_send_buffer_arrives_whole(pki: Pki) -> None:
    async with running_http(authenticator=strict(credential("alice", role="admin")), tls=pki.server) as relay:
        relay.daemon.facts = {"version": "x" * 4_000_000}
        stream = await encrypted(relay, pki.client)
        await stream.send_all(
            f"GET /api/v1/status HTTP/1.1\r\nhost: {relay.authority}\r\nauthorization: {BASIC}\r\n\r\n".encode()
        )
        answer = await read_answer(stream)
        assert len(answer.json["items"][0]["version"]) == 4_000_000


# Certificates


def der_of(folder: Path) -> bytes:
    pem = (folder / "client.pem").read_text()
    begin, end = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
    return ssl.PEM_cert_to_DER_cert(begin + pem.partition(begin)[2].partition(end)[0] + end)


@pytest.fixture
def named(pki: Pki) -> Sequence[Credential]:
    """One credential, identified by the subject of the client's certificate."""
    return (Credential(name="carol", certificate=subject(der_of(pki.folder))),)


async def test_a_certificate_subject_authenticates_without_a_header(pki: Pki, named: Sequence[Credential]) -> None:
    context = contexts.client_tls_context(pki.folder / "ca.pem", pki.folder / "client.pem")
    async with running_http(authenticator=strict(*named), tls=pki.mutual) as relay:
        stream = await encrypted(relay, context)
        assert (await send_request(relay, stream)).status == 200
        assert relay.authenticator is not None
        assert len(relay.authenticator.preauth) == 0


async def test_another_subject_of_the_same_ca_does_not_authenticate(pki: Pki) -> None:
    context = contexts.client_tls_context(pki.folder / "ca.pem", pki.folder / "client.pem")
    async with running_http(
        authenticator=strict(Credential(name="c", certificate="subject:CN=other")), tls=pki.mutual
    ) as relay:
        assert (await send_request(relay, await encrypted(relay, context))).status == 401


async def test_a_client_without_a_certificate_is_refused(pki: Pki, named: Sequence[Credential]) -> None:
    async with running_http(authenticator=strict(*named), tls=pki.mutual) as relay:
        stream = await encrypted(relay, pki.client)  # in TLS 1.3 the client learns of it only afterwards
        with pytest.raises((trio.BrokenResourceError, RuntimeError)):
            await send_request(relay, stream)


async def test_where_only_a_certificate_is_required_a_connection_without_one_takes_a_slot(pki: Pki) -> None:
    context = contexts.client_tls_context(pki.folder / "ca.pem", pki.folder / "client.pem")
    async with running_http(authenticator=strict(), tls=pki.mutual) as relay:
        assert relay.authenticator is not None
        silent = await connect(Endpoint("tcp", relay.host, relay.port))
        while not len(relay.authenticator.preauth):
            await trio.lowlevel.checkpoint()
        assert (await send_request(relay, await encrypted(relay, context))).status == 200
        assert len(relay.authenticator.preauth) == 1
        await silent.aclose()


async def test_a_fingerprint_is_preferred_to_a_subject(pki: Pki, named: Sequence[Credential]) -> None:
    certificate = der_of(pki.folder)
    exact = Credential(name="exact", certificate=fingerprint(certificate))
    found = strict(*named, exact).admit_certificate(certificate, "127.0.0.1")
    assert found is exact
