"""The HTTP face in TLS: who may say a secret from afar, what strangers cost, certificates instead of secrets."""

from __future__ import annotations

import json
import ssl
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.http.support import Answer, Face, read_answer, running_http
from tests.support.credentials import SECRET, credential
from tests.support.papers import Papers
from tests.support.people import connect, is_dropped, read_all
from tunneld.auth.authenticator import Authenticator
from tunneld.auth.preauth import PreauthLimiter
from tunneld.config.credentials import Credential
from tunneld.config.schema import ControlSettings
from tunneld.net.endpoint import Endpoint
from tunneld.tls import contexts
from tunneld.tls.connection import TlsSocket, TlsStream
from tunneld.tls.pins import fingerprint, subject

ALICE = credential("alice")
BASIC = f"Basic {b64encode(f'alice:{SECRET}'.encode()).decode()}"
WRONG = f"Basic {b64encode(b'alice:not the secret').decode()}"


@pytest.fixture(scope="module")
def papers(tmp_path_factory: pytest.TempPathFactory) -> Papers:
    return Papers.issue(tmp_path_factory.mktemp("papers"))


def strict(*credentials: Credential) -> Authenticator:
    """A authenticator for which those on loopback are strangers like others."""
    return Authenticator(lambda: credentials, PreauthLimiter(ControlSettings, exempt=lambda _host: False))


@pytest.fixture
async def face(papers: Papers) -> AsyncIterator[Face]:
    async with running_http(authenticator=strict(ALICE), tls=papers.server) as face:
        yield face


async def encrypted(face: Face, context: ssl.SSLContext) -> TlsStream:
    below = await connect(Endpoint("tcp", face.host, face.port))
    tls = TlsSocket(cast(Any, below.socket)._sock, context, server_hostname="localhost")
    await tls.shake_hands()
    return TlsStream(tls)


async def ask(face: Face, stream: TlsStream, authorization: str = "") -> Answer:
    lines = ["GET /api/v1/list HTTP/1.1", f"host: {face.authority}"]
    lines += [f"authorization: {authorization}"] if authorization else []
    await stream.send_all("\r\n".join([*lines, "", ""]).encode())
    return await read_answer(stream)


async def test_a_program_with_the_authority_and_a_secret_is_let_in(face: Face, papers: Papers) -> None:
    request = urllib.request.Request(f"https://localhost:{face.port}/api/v1/list", headers={"Authorization": BASIC})

    def run() -> Any:
        with urllib.request.urlopen(request, context=papers.client) as answer:
            return json.load(answer)

    assert await trio.to_thread.run_sync(run) == {"text": "0 tunnels", "items": []}


async def test_who_has_shown_a_secret_is_no_stranger_any_more(face: Face, papers: Papers) -> None:
    assert face.authenticator is not None
    stream = await encrypted(face, papers.client)
    assert (await ask(face, stream)).status == 401
    assert len(face.authenticator.preauth) == 1
    assert (await ask(face, stream, BASIC)).status == 200
    assert len(face.authenticator.preauth) == 0
    assert (await ask(face, stream, BASIC)).status == 200


async def test_failures_earn_a_penalty_on_the_same_connection_and_on_the_next(face: Face, papers: Papers) -> None:
    stream = await encrypted(face, papers.client)
    with capture_logs() as logs:
        answers = [(await ask(face, stream, WRONG)).status for _ in range(3)]
    assert answers == [401, 401, 401]
    assert [log["face"] for log in logs if log["event"] == "authentication failed"] == ["http"] * 3
    right = await ask(face, stream, BASIC)
    assert (right.status, right.headers["retry-after"]) == (429, "5")
    assert await is_dropped(await connect(Endpoint("tcp", face.host, face.port)))


async def test_many_guesses_at_once_are_no_more_guesses_than_one_after_another(face: Face, papers: Papers) -> None:
    streams = [await encrypted(face, papers.client) for _ in range(10)]
    statuses: list[int] = []

    async def guess(stream: TlsStream) -> None:
        statuses.append((await ask(face, stream, WRONG)).status)

    async with trio.open_nursery() as nursery:
        for stream in streams:
            nursery.start_soon(guess, stream)
    assert sorted(statuses) == [401] * 3 + [429] * 7


async def test_plain_http_is_told_so(face: Face) -> None:
    stream = await connect(Endpoint("tcp", face.host, face.port))
    await stream.send_all(b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n")
    answer = await read_all(stream)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.endswith(b"this port speaks https\n")


@pytest.mark.parametrize("says", [b"", b"\x16\x03\x01\x02\x00"], ids=["nothing", "half a handshake"])
async def test_who_does_not_finish_a_handshake_has_a_deadline(
    papers: Papers, says: bytes, mock_clock: MockClock
) -> None:
    async with running_http(authenticator=strict(ALICE), tls=papers.server) as face:
        assert face.authenticator is not None
        stream = await connect(Endpoint("tcp", face.host, face.port))
        await stream.send_all(says)
        while not len(face.authenticator.preauth):
            await trio.lowlevel.checkpoint()
        await wait_all_tasks_blocked()
        mock_clock.jump(10)
        assert await is_dropped(stream)
        assert not len(face.authenticator.preauth)


async def test_who_says_nothing_after_it_has_the_same_deadline(papers: Papers, mock_clock: MockClock) -> None:
    async with running_http(authenticator=strict(ALICE), tls=papers.server) as face:
        stream = await encrypted(face, papers.client)
        await wait_all_tasks_blocked(0.05)
        mock_clock.jump(10)
        assert await stream.receive_some() == b""


async def test_strangers_of_one_source_are_few(face: Face) -> None:
    endpoint = Endpoint("tcp", face.host, face.port)
    crowd = [await connect(endpoint) for _ in range(16)]
    assert await is_dropped(await connect(endpoint))
    for stream in crowd:
        await stream.aclose()


async def test_an_answer_larger_than_the_kernel_takes_arrives_whole(papers: Papers) -> None:
    async with running_http(authenticator=strict(credential("alice", role="admin")), tls=papers.server) as face:
        face.relay.facts = {"version": "x" * 4_000_000}
        stream = await encrypted(face, papers.client)
        await stream.send_all(
            f"GET /api/v1/status HTTP/1.1\r\nhost: {face.authority}\r\nauthorization: {BASIC}\r\n\r\n".encode()
        )
        answer = await read_answer(stream)
        assert len(answer.json["items"][0]["version"]) == 4_000_000


# Certificates


def der_of(folder: Path) -> bytes:
    pem = (folder / "client.pem").read_text()
    begin, end = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
    return ssl.PEM_cert_to_DER_cert(begin + pem.partition(begin)[2].partition(end)[0] + end)


@pytest.fixture
def named(papers: Papers) -> Sequence[Credential]:
    """One credential, known by the subject of the client's certificate."""
    return (Credential(name="carol", certificate=subject(der_of(papers.folder))),)


async def test_a_subject_lets_in_without_a_header(papers: Papers, named: Sequence[Credential]) -> None:
    context = contexts.client_tls_context(papers.folder / "ca.pem", papers.folder / "client.pem")
    async with running_http(authenticator=strict(*named), tls=papers.mutual) as face:
        stream = await encrypted(face, context)
        assert (await ask(face, stream)).status == 200
        assert face.authenticator is not None
        assert len(face.authenticator.preauth) == 0


async def test_another_subject_of_the_same_authority_does_not(papers: Papers) -> None:
    context = contexts.client_tls_context(papers.folder / "ca.pem", papers.folder / "client.pem")
    async with running_http(
        authenticator=strict(Credential(name="c", certificate="subject:CN=other")), tls=papers.mutual
    ) as face:
        assert (await ask(face, await encrypted(face, context))).status == 401


async def test_without_a_certificate_nobody_comes_in(papers: Papers, named: Sequence[Credential]) -> None:
    async with running_http(authenticator=strict(*named), tls=papers.mutual) as face:
        stream = await encrypted(face, papers.client)  # in TLS 1.3 the client hears of it only afterwards
        with pytest.raises((trio.BrokenResourceError, RuntimeError)):
            await ask(face, stream)


async def test_where_a_certificate_is_all_that_is_asked_for_who_has_none_is_a_stranger(papers: Papers) -> None:
    context = contexts.client_tls_context(papers.folder / "ca.pem", papers.folder / "client.pem")
    async with running_http(authenticator=strict(), tls=papers.mutual) as face:
        assert face.authenticator is not None
        silent = await connect(Endpoint("tcp", face.host, face.port))
        while not len(face.authenticator.preauth):
            await trio.lowlevel.checkpoint()
        assert (await ask(face, await encrypted(face, context))).status == 200
        assert len(face.authenticator.preauth) == 1
        await silent.aclose()


async def test_a_fingerprint_comes_before_a_subject(papers: Papers, named: Sequence[Credential]) -> None:
    certificate = der_of(papers.folder)
    exact = Credential(name="exact", certificate=fingerprint(certificate))
    found = strict(*named, exact).admit_certificate(certificate, "127.0.0.1")
    assert found is exact
