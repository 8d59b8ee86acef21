"""Visitors whose TLS ends in the agent."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from tests.engine.bench import open_descriptors, stream, tcp_pair
from tests.support.pki import Pki
from tunneld.acme.challenges import challenge_context
from tunneld.acme.state import FailureTable, account_folder
from tunneld.agent.events import Field
from tunneld.agent.https import AGENT_FOLDER, HANDSHAKE_TIMEOUT, OwnCertificates, TlsVisitors
from tunneld.agent.source import SocketVisitor, VisitorConnection
from tunneld.config.certificates import AcmeSettings
from tunneld.engine.engine import Engine
from tunneld.engine.limits import EngineLimits
from tunneld.engine.portable import PortableEngine
from tunneld.engine.pump import Pump
from tunneld.errors import UsageError

HEADER = b"the PROXY header"


@dataclass
class Recorded:
    """Stands for the certificates, the visitors behind the handshake, and the reporter."""

    engine: Engine
    contexts: dict[tuple[str, bool], ssl.SSLContext] = field(default_factory=dict)
    visitors: list[VisitorConnection] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def context_for(self, name: str, protocols: tuple[bytes, ...]) -> ssl.SSLContext | None:
        return self.contexts.get((name, b"acme-tls/1" in protocols))

    def take(self, *, proxy_header: bool = False) -> trio.SocketStream:
        """A new visitor; returns its far side."""
        tls = TlsVisitors(
            self.engine,
            self,  # type: ignore[arg-type]
            lambda visitor, _header: self.visitors.append(visitor),
            lambda _header, reason: self.failures.append(reason),
            proxy_header=proxy_header,
        )
        far, near = tcp_pair()
        tls.take(SocketVisitor(near), HEADER)
        return stream(far)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Recorded]:
    before = open_descriptors()
    pump = Pump(EngineLimits())
    async with trio.open_nursery() as nursery:
        await nursery.start(pump.run)
        yield Recorded(pump)
        nursery.cancel_scope.cancel()
    assert open_descriptors() == before


async def handshake(far: trio.SocketStream, pki: Pki, *protocols: str) -> trio.SSLStream[trio.SocketStream]:
    context = pki.client
    context.set_alpn_protocols(list(protocols))
    tls = trio.SSLStream(far, context, server_hostname="localhost", https_compatible=True)
    await tls.do_handshake()
    return tls


@pytest.mark.parametrize("proxy_header", [False, True])
async def test_a_visitor_is_decrypted(bench: Recorded, tmp_path: Path, proxy_header: bool) -> None:
    pki = Pki.issue(tmp_path)
    bench.contexts["localhost", False] = pki.server
    async with await handshake(bench.take(proxy_header=proxy_header), pki) as tls:
        await tls.send_all(b"hello")
        while not bench.visitors:
            await trio.lowlevel.checkpoint()
        async with bench.visitors[0].stream() as server:
            expected = HEADER + b"hello" if proxy_header else b"hello"
            received = b""
            while len(received) < len(expected):
                received += await server.receive_some()
            assert received == expected
            await server.send_all(b"answer")
            assert await tls.receive_some() == b"answer"


async def test_without_a_certificate_the_visitor_is_told(bench: Recorded, tmp_path: Path) -> None:
    far = bench.take()
    with pytest.raises(trio.BrokenResourceError) as failed:
        await handshake(far, Pki.issue(tmp_path))
    assert "UNRECOGNIZED_NAME" in str(failed.value.__cause__)
    assert bench.failures == ["localhost: its certificate is not yet available"]
    far.socket.close()


async def test_a_challenge_is_answered_and_is_no_visitor(bench: Recorded, tmp_path: Path) -> None:
    bench.contexts["localhost", True] = challenge_context("localhost", bytes(32))
    pki = Pki.issue(tmp_path)
    context = pki.client
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["acme-tls/1"])
    tls = trio.SSLStream(bench.take(), context, server_hostname="localhost", https_compatible=True)
    await tls.do_handshake()
    assert tls.selected_alpn_protocol() == "acme-tls/1"
    assert await tls.receive_some() == b""
    await tls.aclose()
    assert (bench.visitors, bench.failures) == ([], [])


@pytest.mark.parametrize("sent", [b"", b"\x16\x03\x01\x02\x00\x01"])
async def test_a_handshake_has_a_deadline(bench: Recorded, autojump_clock: MockClock, sent: bytes) -> None:
    far, began = bench.take(), trio.current_time()
    await far.send_all(sent)
    with pytest.raises(trio.BrokenResourceError):
        await far.receive_some()
    assert trio.current_time() - began == pytest.approx(HANDSHAKE_TIMEOUT, abs=0.2)
    assert bench.failures == ["no TLS handshake within 10 s"]
    far.socket.close()


async def test_what_is_no_tls_gets_an_alert(bench: Recorded) -> None:
    far = bench.take()
    await far.send_all(b"GET / HTTP/1.1\r\n\r\n")
    assert (await far.receive_some())[:1] == b"\x15"
    assert len(bench.failures) == 1
    far.socket.close()


async def test_a_visitor_that_leaves_or_rejects_the_certificate_is_a_failure(bench: Recorded, tmp_path: Path) -> None:
    far = bench.take()
    await far.aclose()
    while not bench.failures:
        await trio.lowlevel.checkpoint()
    assert bench.failures.pop() == "the visitor left before the TLS handshake"
    bench.contexts["localhost", False] = Pki.issue(tmp_path / "server").server
    far = bench.take()
    with pytest.raises(trio.BrokenResourceError):
        await handshake(far, Pki.issue(tmp_path / "other"))
    far.socket.close()
    while not bench.failures:
        await trio.lowlevel.checkpoint()
    assert "TLS handshake failed" in bench.failures[0]
    assert bench.visitors == []


def test_a_system_without_a_pump_cannot_end_tls() -> None:
    with pytest.raises(UsageError, match="no epoll"):
        Recorded(PortableEngine(EngineLimits())).take()


class Reports:
    """Implements `Reporter`."""

    wants_visitors = False

    def __init__(self) -> None:
        self.reported: list[tuple[str, dict[str, Field]]] = []

    def report(self, event: str, /, **fields: Field) -> None:
        self.reported.append((event, fields))


async def test_a_failure_of_an_earlier_run_is_reported_and_not_repeated_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)
    settings = AcmeSettings(enabled=True, agree=True, directory="https://localhost:1/dir")
    failures = FailureTable()
    failures.load(account_folder(tmp_path / "tunneld" / AGENT_FOLDER, settings.directory))
    failures.record("blog.example.org", "no answer", 4e9, 300, 3600)
    failures.save()
    reports = Reports()
    certificates = OwnCertificates(settings, reports)
    nursery.start_soon(certificates.run)
    await trio.testing.wait_all_tasks_blocked()
    certificates.want("blog.example.org")
    certificates.want("blog.example.org")
    await trio.testing.wait_all_tasks_blocked()
    assert reports.reported == [("uncertified", {"host": "blog.example.org", "reason": "no answer"})]
    assert certificates.context_for("blog.example.org", ()) is None
