"""The handshake of tunnels with a key: which connections are admitted, what the refused ones receive, and cleanup.

Relaying over such tunnels is tested in tests/tunnel/test_tunnel.py, and agents that use them in tests/agent/.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.engine.bench import open_descriptors
from tests.support.hidden_servers import HANDSHAKE_TIMEOUT, connect_hidden, start_handshakes
from tests.support.peers import connect, is_dropped, read_all, read_exactly
from tests.support.pki import Pki
from tunneld.auth.authenticator import PREAUTH_LOG_RATE, Authenticator
from tunneld.auth.preauth import PreauthLimiter
from tunneld.backends import BACKENDS
from tunneld.config.schema import ControlSettings, Settings, TunnelSettings
from tunneld.directory.requester import Requester
from tunneld.directory.service import TunnelService
from tunneld.engine.engine import Engine
from tunneld.errors import UsageError
from tunneld.net.endpoint import Endpoint, parse_network
from tunneld.policy.access import Grant
from tunneld.policy.options import TunnelOptions
from tunneld.tls.connection import TlsSocket
from tunneld.tunnel.tunnel import Tunnel

ME = Requester(host="127.0.0.1", owner="127.0.0.1:9", local_host="127.0.0.1")
BOTH_MODES = pytest.mark.parametrize("secure", ["key", "yes"])


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki.issue(tmp_path_factory.mktemp("pki"))


@pytest.fixture
def authenticator() -> Authenticator:
    """Limits for unauthenticated connections, loopback included."""
    return Authenticator(lambda: (), PreauthLimiter(ControlSettings, exempt=lambda _host: False))


@pytest.fixture
async def service(nursery: trio.Nursery, engine: Engine, pki: Pki, authenticator: Authenticator) -> TunnelService:
    handshakes = await start_handshakes(nursery, pki, authenticator)
    settings = Settings(tunnels=TunnelSettings(ports="0"))
    service = TunnelService(lambda: settings, engine, BACKENDS, handshakes=handshakes)
    await nursery.start(service.run)
    return service


async def open_tunnel(service: TunnelService, requester: Requester = ME, **options: str) -> Tunnel:
    return await service.open_tunnel("tcp", TunnelOptions.parse({"persist": "yes", **options}), requester)


def raw(stream: trio.SocketStream) -> Any:
    """The socket inside."""
    return cast(Any, stream.socket)._sock


async def until_unauthenticated(authenticator: Authenticator, count: int) -> None:
    while len(authenticator.preauth) != count:
        await trio.lowlevel.checkpoint()


async def exchange(tunnel: Tunnel, pki: Pki, data: bytes) -> bytes:
    """Connect, send `data`, in TLS if the tunnel uses it, and return all that is received."""
    stream = await connect(tunnel.server_uri)
    if tunnel.server_uri.scheme == "tcp":
        await stream.send_all(data)
        return await read_all(stream)
    tls = TlsSocket(raw(stream), pki.client, server_hostname="localhost")
    await tls.shake_hands()
    await tls.send_all(data)
    received = b""
    while more := await tls.receive(1000):
        received += more
    return received


@BOTH_MODES
@pytest.mark.parametrize(
    "data", [b"wrong\n", b"\n", b"\xff\x00\n", b"x" * 128], ids=["wrong", "empty", "binary", "too long"]
)
async def test_a_wrong_key_is_refused_and_penalised(
    service: TunnelService, pki: Pki, authenticator: Authenticator, secure: str, data: bytes
) -> None:
    tunnel = await open_tunnel(service, secure=secure)
    with capture_logs() as logs:
        for guess in (data, b"1" + data, b"2" + data):
            assert await exchange(tunnel, pki, guess[:128]) == b"ERR not-allowed wrong key\n"
    await until_unauthenticated(authenticator, 0)
    assert tunnel.parked == 0
    assert authenticator.penalty("127.0.0.1") > 0
    assert await is_dropped(await connect(tunnel.server_uri))
    failures = [log for log in logs if log["event"] == "authentication failed"]
    assert [(log["peer"], log["service"]) for log in failures] == [("127.0.0.1", "tcp")] * 3
    assert tunnel.server_uri.key not in str(logs)


@BOTH_MODES
async def test_a_connection_with_the_key_frees_its_preauth_slot(
    service: TunnelService, pki: Pki, authenticator: Authenticator, secure: str
) -> None:
    tunnel = await open_tunnel(service, secure=secure)
    server = await connect_hidden(tunnel.server_uri, pki)
    while not tunnel.parked:
        await trio.lowlevel.checkpoint()
    assert len(authenticator.preauth) == 0
    visitor = await connect(tunnel.client_uri)
    await visitor.send_all(b"x")
    assert await read_exactly(server, 1) == b"x"


@BOTH_MODES
async def test_a_carriage_return_and_blanks_around_the_key_are_ignored(
    service: TunnelService, pki: Pki, secure: str
) -> None:
    tunnel = await open_tunnel(service, secure=secure)
    spaced = replace(tunnel.server_uri, key=f" {tunnel.server_uri.key} \r")
    await connect_hidden(spaced, pki)
    while not tunnel.parked:
        await trio.lowlevel.checkpoint()


@BOTH_MODES
@pytest.mark.parametrize("size", [1, 200, 5000, 40_000])
async def test_bytes_sent_together_with_the_key_go_to_the_visitor(
    service: TunnelService, pki: Pki, secure: str, size: int
) -> None:
    """In TLS all of them may be in the record of the key, of which only a line was requested."""
    tunnel = await open_tunnel(service, secure=secure)
    stream = await connect(tunnel.server_uri)
    data = f"{tunnel.server_uri.key}\n".encode() + bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    if secure == "yes":
        tls = TlsSocket(raw(stream), pki.client, server_hostname="localhost")
        await tls.shake_hands()
        await tls.send_all(data)
    else:
        await stream.send_all(data)
    visitor = await connect(tunnel.client_uri)
    assert await read_exactly(visitor, size) == data.partition(b"\n")[2]


@BOTH_MODES
async def test_a_silent_connection_is_closed_after_the_deadline(
    service: TunnelService, authenticator: Authenticator, secure: str, mock_clock: MockClock
) -> None:
    tunnel = await open_tunnel(service, secure=secure)
    silent = await connect(tunnel.server_uri)
    await until_unauthenticated(authenticator, 1)
    await wait_all_tasks_blocked()
    mock_clock.jump(HANDSHAKE_TIMEOUT)
    assert await is_dropped(silent)
    await until_unauthenticated(authenticator, 0)


@BOTH_MODES
async def test_unauthenticated_connections_are_limited_and_close_with_the_tunnel(
    service: TunnelService, authenticator: Authenticator, secure: str
) -> None:
    before = open_descriptors()
    tunnel = await open_tunnel(service, secure=secure)
    streams = [await connect(tunnel.server_uri) for _ in range(16)]
    await until_unauthenticated(authenticator, 16)
    assert await is_dropped(await connect(tunnel.server_uri))
    await service.close(tunnel.id)
    for stream in streams:
        assert await is_dropped(stream)
        await stream.aclose()
    await until_unauthenticated(authenticator, 0)
    assert open_descriptors() <= before + 1


async def test_plain_text_on_a_tls_port_gets_an_error_line(service: TunnelService) -> None:
    tunnel = await open_tunnel(service, secure="yes")
    stream = await connect(tunnel.server_uri)
    await stream.send_all(b"key\n")
    assert await read_all(stream) == b"ERR protocol this port speaks TLS; use openssl s_client\n"


async def test_tls_on_a_plain_text_port_is_closed(service: TunnelService, pki: Pki) -> None:
    tunnel = await open_tunnel(service, secure="key")
    stream = await connect(tunnel.server_uri)
    tls = TlsSocket(raw(stream), pki.client, server_hostname="localhost")
    with pytest.raises(OSError):  # noqa: PT011  any of OpenSSL's errors
        await tls.shake_hands()


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"secure": "yes"}, "any"),
        ({"secure": "key"}, "192.0.2.1/32"),
        ({"secure": "no"}, "192.0.2.1/32"),
        ({"secure": "yes", "server_from": "192.0.2.0/24"}, "192.0.2.0/24"),
    ],
)
async def test_an_encrypted_key_admits_any_address(
    service: TunnelService, options: dict[str, str], allowed: str
) -> None:
    tunnel = await open_tunnel(service, replace(ME, host="192.0.2.1"), **options)
    assert str(tunnel.spec.allowed_sources or "any") == allowed


async def test_an_encrypted_key_does_not_override_the_limits_of_a_credential(service: TunnelService) -> None:
    grant = Grant("alice", server_from=(parse_network("192.0.2.0/24"),))
    tunnel = await open_tunnel(service, replace(ME, host="192.0.2.1", grant=grant), secure="yes")
    assert str(tunnel.spec.allowed_sources) == "192.0.2.1/32"


@BOTH_MODES
async def test_a_reopened_tunnel_keeps_its_key(service: TunnelService, secure: str) -> None:
    first = await open_tunnel(service, secure=secure, name="web")
    again = await open_tunnel(service, secure=secure, name="web")
    assert again.server_uri == first.server_uri
    other = await open_tunnel(service, secure=secure, name="other")
    assert other.server_uri.key != first.server_uri.key


KEPT = {"no": True, "key": True, "yes": False}
"""Values of `secure`, and whether connections through such a tunnel outlive a restart, as tunneld(8) and README say."""


@pytest.mark.parametrize(("secure", "kept"), KEPT.items())
async def test_connections_without_tls_are_handed_over(
    service: TunnelService, pki: Pki, secure: str, kept: bool
) -> None:
    tunnel = await open_tunnel(service, secure=secure)
    used = await connect_hidden(tunnel.server_uri, pki)
    visitor = await connect(tunnel.client_uri)
    await visitor.send_all(b"hello")
    assert await read_exactly(used, 5) == b"hello"
    spare = await connect_hidden(tunnel.server_uri, pki)
    while not tunnel.parked:
        await trio.lowlevel.checkpoint()
    ((_owner, snapshot),) = (await service.export()).tunnels
    assert (len(snapshot.relays), len(snapshot.server.parked)) == ((1, 1) if kept else (0, 0))
    snapshot.close()
    for relay in snapshot.relays:
        relay.state.close()
    for stream in (used, visitor, spare):
        await trio.aclose_forcefully(stream)


def test_documents_say_which_connections_outlive_a_restart() -> None:
    root = Path(__file__).parents[2]
    page = " ".join((root / "man/tunneld.8").read_text().partition(".Sh RESTARTS")[2].split())
    without = " No or ".join(f"Cm secure={secure}" for secure, kept in KEPT.items() if kept)
    assert f"backend without TLS .Pq {without} . All other connections are closed" in page
    assert "`tcp` tunnels without TLS |" in (root / "README.md").read_text()
    assert "keeps the connections of tcp tunnels without TLS" in (root / "CHANGELOG.md").read_text()


@pytest.mark.parametrize(("before", "after"), [("key", "yes"), ("yes", "key")])
async def test_a_key_is_not_used_again_with_another_scheme(service: TunnelService, before: str, after: str) -> None:
    """With `key` it crossed the network in clear, and with `yes` it admits a hidden server from any address."""
    first = await open_tunnel(service, secure=before, name="web")
    again = await open_tunnel(service, secure=after, name="web")
    assert again.server_uri.port == first.server_uri.port
    assert again.server_uri.key not in {first.server_uri.key, ""}


async def test_without_a_certificate_only_secure_key_is_available(nursery: trio.Nursery, engine: Engine) -> None:
    handshakes = await start_handshakes(nursery, None)
    settings = Settings(tunnels=TunnelSettings(ports="0"))
    service = TunnelService(lambda: settings, engine, BACKENDS, handshakes=handshakes)
    await nursery.start(service.run)
    with pytest.raises(UsageError, match=r"control\.tls.*secure=key"):
        await open_tunnel(service, secure="yes")
    assert (await open_tunnel(service, secure="key")).server_uri.scheme == "tcp"


async def test_a_system_without_a_pump_refuses_keys(engine: Engine, nursery: trio.Nursery) -> None:
    service = TunnelService(lambda: Settings(tunnels=TunnelSettings(ports="0")), engine, BACKENDS)
    await nursery.start(service.run)
    with pytest.raises(UsageError, match="epoll"):
        await open_tunnel(service, secure="key")


@pytest.fixture
async def parked(service: TunnelService, pki: Pki) -> tuple[Tunnel, TlsSocket]:
    """A tunnel, and the parked TLS connection of its hidden server."""
    tunnel = await open_tunnel(service, secure="yes")
    stream = await connect(tunnel.server_uri)
    tls = TlsSocket(raw(stream), pki.client, server_hostname="localhost")
    await tls.shake_hands()
    await tls.send_all(f"{tunnel.server_uri.key}\n".encode())
    assert await tls.receive(100) == b"OK\n"
    return tunnel, tls


async def test_a_parked_connection_that_sends_close_notify_is_dropped(parked: tuple[Tunnel, TlsSocket]) -> None:
    """To the kernel the close_notify is bytes; it must not count as data for a visitor."""
    tunnel, tls = parked
    assert tunnel.parked == 1
    tls.finish()
    assert tls.flush()
    while tunnel.parked:
        await trio.lowlevel.checkpoint()


async def test_a_parked_connection_that_is_truncated_is_dropped(parked: tuple[Tunnel, TlsSocket]) -> None:
    tunnel, tls = parked
    tls.connection.shutdown(socket.SHUT_WR)
    while tunnel.parked:
        await trio.lowlevel.checkpoint()


def test_server_uris_have_keys() -> None:
    assert Endpoint.parse("tls://h:1/abc") == Endpoint("tls", "h", 1, "abc")
    assert Endpoint.parse("tls://h:1/abc").without_key == "tls://h:1/..."


class AfterNextIoWait(trio.abc.Instrument):
    """Calls a function once, after the next wait for I/O and before the woken tasks run."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self._callback = callback

    def after_io_wait(self, timeout: float) -> None:
        trio.lowlevel.remove_instrument(self)
        self._callback()


@BOTH_MODES
async def test_a_key_that_arrives_while_the_tunnel_closes_is_not_parked(
    service: TunnelService, pki: Pki, authenticator: Authenticator, secure: str
) -> None:
    tunnel = await open_tunnel(service, secure=secure)
    side = tunnel.server_side
    with trio.fail_after(HANDSHAKE_TIMEOUT):
        stream = await connect(tunnel.server_uri)
        await until_unauthenticated(authenticator, 1)
        key = f"{tunnel.server_uri.key}\n".encode()
        if secure == "yes":
            tls = TlsSocket(raw(stream), pki.client, server_hostname="localhost")
            await tls.shake_hands()
            await wait_all_tasks_blocked()
            tls.write(memoryview(key))
            tls.flush()
        else:
            await wait_all_tasks_blocked()
            raw(stream).send(key)
        trio.lowlevel.add_instrument(AfterNextIoWait(side.close))
        await until_unauthenticated(authenticator, 0)
        assert side.parked == 0
        assert b"OK" not in await read_all(stream)


async def test_a_failed_tls_handshake_is_penalised(service: TunnelService, authenticator: Authenticator) -> None:
    tunnel = await open_tunnel(service, secure="yes")
    for _ in range(3):
        assert authenticator.penalty("127.0.0.1") == 0
        async with await connect(tunnel.server_uri) as stream:
            await stream.send_all(b"\x16\x03\x01\x00\x05garbage")
            with suppress(trio.BrokenResourceError):
                await read_all(stream)  # a TLS alert
        await until_unauthenticated(authenticator, 0)
    assert authenticator.penalty("127.0.0.1") > 0


ABANDONED = 5
"""Handshakes that a source may abandon in these tests."""


@pytest.fixture
def strict(authenticator: Authenticator) -> Authenticator:
    settings = ControlSettings(abandoned_handshakes=f"{ABANDONED}/h")
    authenticator.preauth = PreauthLimiter(lambda: settings, exempt=lambda _host: False)
    return authenticator


@pytest.mark.parametrize(("secure", "sent"), [("yes", b"\x16\x03\x01"), ("key", b"half a key")])
async def test_abandoned_handshakes_are_penalised_and_probes_are_not(
    service: TunnelService, strict: Authenticator, secure: str, sent: bytes
) -> None:
    tunnel = await open_tunnel(service, secure=secure)

    async def leave(after: bytes) -> None:
        async with await connect(tunnel.server_uri) as stream:
            await stream.send_all(after)
        await wait_all_tasks_blocked(0.005)
        await until_unauthenticated(strict, 0)

    for data in [b""] * 20 + [sent] * (ABANDONED + 2):
        await leave(data)
    assert strict.penalty("127.0.0.1") == 0
    await leave(sent)
    assert strict.penalty("127.0.0.1") > 0


async def test_one_device_with_a_wrong_key_does_not_block_its_address(
    service: TunnelService, pki: Pki, strict: Authenticator
) -> None:
    tunnel = await open_tunnel(service, secure="key")
    for _ in range(1 + ABANDONED + 1):
        assert await exchange(tunnel, pki, b"an old key\n") == b"ERR not-allowed wrong key\n"
    await until_unauthenticated(strict, 0)
    assert strict.penalty("127.0.0.1") == 0
    await exchange(tunnel, pki, b"an old key\n")  # beyond the rate of abandoned handshakes
    await until_unauthenticated(strict, 0)
    assert strict.penalty("127.0.0.1") > 0


async def test_a_flood_does_not_crowd_failed_authentications_out_of_the_log(
    service: TunnelService, pki: Pki, authenticator: Authenticator, mock_clock: MockClock
) -> None:
    authenticator.preauth = PreauthLimiter(ControlSettings)  # loopback has no penalty
    tunnel = await open_tunnel(service, secure="key")
    with capture_logs() as logs:
        for _ in range(40):
            async with await connect(tunnel.server_uri) as stream:
                await stream.send_all(b"half a key")
            await wait_all_tasks_blocked(0.001)
        for number in range(20):
            await exchange(tunnel, pki, b"%d\n" % number)
        await until_unauthenticated(authenticator, 0)
        mock_clock.jump(6)  # a tenth of the minute
        async with await connect(tunnel.server_uri) as stream:
            await stream.send_all(b"half a key")
        await wait_all_tasks_blocked(0.005)
    refused = [log for log in logs if log["event"] == "hidden server refused"]
    assert [log["left_out"] for log in refused] == [0] * PREAUTH_LOG_RATE.count + [40 - PREAUTH_LOG_RATE.count]
    assert len([log for log in logs if log["event"] == "authentication failed"]) == 20
