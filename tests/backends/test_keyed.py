"""Tunnels whose hidden server shows a key: who is let in, what strangers hear, what is left of them.

That such a tunnel relays as every other is in test_tunnel.py, that agents use it in agent/.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any, cast

import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.engine.bench import open_descriptors
from tests.support.keyed import PATIENT, connect_hidden, open_lobby
from tests.support.papers import Papers
from tests.support.people import connect, is_dropped, read_all, read_exactly
from tunneld.auth.authenticator import Authenticator
from tunneld.auth.preauth import PreauthLimiter
from tunneld.backends import BACKENDS
from tunneld.config.schema import ControlSettings, Settings, TunnelSettings
from tunneld.directory.service import Requester, TunnelService
from tunneld.engine.engine import Engine
from tunneld.errors import UsageError
from tunneld.net.endpoint import Endpoint, parse_network
from tunneld.policy.access import Grant
from tunneld.policy.options import TunnelOptions
from tunneld.tls.connection import TlsSocket
from tunneld.tunnel.tunnel import Tunnel

ME = Requester(host="127.0.0.1", owner="127.0.0.1:9", local_host="127.0.0.1")
BOTH = pytest.mark.parametrize("secure", ["key", "yes"])


@pytest.fixture(scope="module")
def papers(tmp_path_factory: pytest.TempPathFactory) -> Papers:
    return Papers.issue(tmp_path_factory.mktemp("papers"))


@pytest.fixture
def gate() -> Authenticator:
    """Also those on loopback are strangers like others."""
    return Authenticator(lambda: (), PreauthLimiter(ControlSettings, exempt=lambda _host: False))


@pytest.fixture
async def service(nursery: trio.Nursery, engine: Engine, papers: Papers, gate: Authenticator) -> TunnelService:
    lobby = await open_lobby(nursery, papers, gate)
    service = TunnelService(lambda: Settings(tunnels=TunnelSettings(ports="0")), engine, BACKENDS, lobby=lobby)
    await nursery.start(service.run)
    return service


async def open_tunnel(service: TunnelService, asker: Requester = ME, **words: str) -> Tunnel:
    return await service.open_tunnel("tcp", TunnelOptions.parse({"persist": "yes", **words}), asker)


def raw(stream: trio.SocketStream) -> Any:
    """The socket inside."""
    return cast(Any, stream.socket)._sock


async def until_strangers(gate: Authenticator, count: int) -> None:
    while len(gate.preauth) != count:
        await trio.lowlevel.checkpoint()


async def say(tunnel: Tunnel, papers: Papers, said: bytes) -> bytes:
    """What is heard by somebody who says this first, after a handshake where there is one."""
    stream = await connect(tunnel.server_uri)
    if tunnel.server_uri.scheme == "tcp":
        await stream.send_all(said)
        return await read_all(stream)
    tls = TlsSocket(raw(stream), papers.client, server_hostname="localhost")
    await tls.shake_hands()
    await tls.send_all(said)
    heard = b""
    while more := await tls.receive(1000):
        heard += more
    return heard


@BOTH
@pytest.mark.parametrize(
    "said", [b"wrong\n", b"\n", b"\xff\x00\n", b"x" * 128], ids=["wrong", "none", "odd", "endless"]
)
async def test_a_wrong_key_is_refused_and_counts(
    service: TunnelService, papers: Papers, gate: Authenticator, secure: str, said: bytes
) -> None:
    tunnel = await open_tunnel(service, secure=secure)
    with capture_logs() as logs:
        for _ in range(3):
            assert await say(tunnel, papers, said) == b"ERR not-allowed wrong key\n"
    await until_strangers(gate, 0)
    assert tunnel.parked == 0
    assert gate.penalty("127.0.0.1") > 0
    assert await is_dropped(await connect(tunnel.server_uri))
    told = [log for log in logs if log["event"] == "authentication failed"]
    assert [(log["peer"], log["service"]) for log in told] == [("127.0.0.1", "tcp")] * 3
    assert tunnel.server_uri.key not in str(logs)


@BOTH
async def test_who_has_shown_the_key_is_no_stranger(
    service: TunnelService, papers: Papers, gate: Authenticator, secure: str
) -> None:
    tunnel = await open_tunnel(service, secure=secure)
    server = await connect_hidden(tunnel.server_uri, papers)
    while not tunnel.parked:
        await trio.lowlevel.checkpoint()
    assert len(gate.preauth) == 0
    visitor = await connect(tunnel.client_uri)
    await visitor.send_all(b"x")
    assert await read_exactly(server, 1) == b"x"


@BOTH
async def test_a_carriage_return_and_blanks_around_the_key_are_ignored(
    service: TunnelService, papers: Papers, secure: str
) -> None:
    tunnel = await open_tunnel(service, secure=secure)
    spaced = replace(tunnel.server_uri, key=f" {tunnel.server_uri.key} \r")
    await connect_hidden(spaced, papers)
    while not tunnel.parked:
        await trio.lowlevel.checkpoint()


@BOTH
@pytest.mark.parametrize("size", [1, 200, 5000, 40_000])
async def test_what_is_said_in_one_breath_with_the_key_is_for_the_visitor(
    service: TunnelService, papers: Papers, secure: str, size: int
) -> None:
    """In TLS all of it may be in the record of the key, of which no more than a line was wanted at first."""
    tunnel = await open_tunnel(service, secure=secure)
    stream = await connect(tunnel.server_uri)
    said = f"{tunnel.server_uri.key}\n".encode() + bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    if secure == "yes":
        tls = TlsSocket(raw(stream), papers.client, server_hostname="localhost")
        await tls.shake_hands()
        await tls.send_all(said)
    else:
        await stream.send_all(said)
    visitor = await connect(tunnel.client_uri)
    assert await read_exactly(visitor, size) == said.partition(b"\n")[2]


@BOTH
async def test_who_says_nothing_has_a_deadline(
    service: TunnelService, gate: Authenticator, secure: str, mock_clock: MockClock
) -> None:
    tunnel = await open_tunnel(service, secure=secure)
    silent = await connect(tunnel.server_uri)
    await until_strangers(gate, 1)
    await wait_all_tasks_blocked()
    mock_clock.jump(PATIENT)
    assert await is_dropped(silent)
    await until_strangers(gate, 0)


@BOTH
async def test_strangers_have_few_places_and_a_tunnel_that_closes_sends_them_away(
    service: TunnelService, gate: Authenticator, secure: str
) -> None:
    before = open_descriptors()
    tunnel = await open_tunnel(service, secure=secure)
    crowd = [await connect(tunnel.server_uri) for _ in range(16)]
    await until_strangers(gate, 16)
    assert await is_dropped(await connect(tunnel.server_uri))
    await service.close(tunnel.id)
    for stream in crowd:
        assert await is_dropped(stream)
        await stream.aclose()
    await until_strangers(gate, 0)
    assert open_descriptors() <= before + 1


async def test_plain_text_where_tls_is_spoken_is_told_so(service: TunnelService) -> None:
    tunnel = await open_tunnel(service, secure="yes")
    stream = await connect(tunnel.server_uri)
    await stream.send_all(b"key\n")
    assert await read_all(stream) == b"ERR protocol this port speaks TLS; use openssl s_client\n"


async def test_tls_where_plain_text_is_spoken_ends(service: TunnelService, papers: Papers) -> None:
    tunnel = await open_tunnel(service, secure="key")
    stream = await connect(tunnel.server_uri)
    tls = TlsSocket(raw(stream), papers.client, server_hostname="localhost")
    with pytest.raises(OSError):  # noqa: PT011  OpenSSL's errors, all of them
        await tls.shake_hands()


@pytest.mark.parametrize(
    ("words", "admits"),
    [
        ({"secure": "yes"}, "any"),
        ({"secure": "key"}, "192.0.2.1/32"),
        ({"secure": "no"}, "192.0.2.1/32"),
        ({"secure": "yes", "server_from": "192.0.2.0/24"}, "192.0.2.0/24"),
    ],
)
async def test_who_shows_a_hidden_key_may_come_from_anywhere(
    service: TunnelService, words: dict[str, str], admits: str
) -> None:
    tunnel = await open_tunnel(service, replace(ME, host="192.0.2.1"), **words)
    assert str(tunnel.spec.allowed_sources or "any") == admits


async def test_but_not_where_its_credential_bounds_that(service: TunnelService) -> None:
    grant = Grant("alice", server_from=(parse_network("192.0.2.0/24"),))
    tunnel = await open_tunnel(service, replace(ME, host="192.0.2.1", grant=grant), secure="yes")
    assert str(tunnel.spec.allowed_sources) == "192.0.2.1/32"


@BOTH
async def test_a_tunnel_that_is_opened_anew_keeps_its_key(service: TunnelService, secure: str) -> None:
    first = await open_tunnel(service, secure=secure, name="web")
    again = await open_tunnel(service, secure=secure, name="web")
    assert again.server_uri == first.server_uri
    other = await open_tunnel(service, secure=secure, name="other")
    assert other.server_uri.key != first.server_uri.key


async def test_without_a_certificate_a_key_alone_can_be_had(nursery: trio.Nursery, engine: Engine) -> None:
    lobby = await open_lobby(nursery, None)
    service = TunnelService(lambda: Settings(tunnels=TunnelSettings(ports="0")), engine, BACKENDS, lobby=lobby)
    await nursery.start(service.run)
    with pytest.raises(UsageError, match=r"control\.tls.*secure=key"):
        await open_tunnel(service, secure="yes")
    assert (await open_tunnel(service, secure="key")).server_uri.scheme == "tcp"


async def test_a_system_without_a_pump_says_so(engine: Engine, nursery: trio.Nursery) -> None:
    service = TunnelService(lambda: Settings(tunnels=TunnelSettings(ports="0")), engine, BACKENDS)
    await nursery.start(service.run)
    with pytest.raises(UsageError, match="epoll"):
        await open_tunnel(service, secure="key")


@pytest.fixture
async def parked(service: TunnelService, papers: Papers) -> tuple[Tunnel, TlsSocket]:
    """A tunnel, and its hidden server in TLS, which has heard OK."""
    tunnel = await open_tunnel(service, secure="yes")
    stream = await connect(tunnel.server_uri)
    tls = TlsSocket(raw(stream), papers.client, server_hostname="localhost")
    await tls.shake_hands()
    await tls.send_all(f"{tunnel.server_uri.key}\n".encode())
    assert await tls.receive(100) == b"OK\n"
    return tunnel, tls


async def test_a_hidden_server_that_says_goodbye_is_not_parked_any_more(parked: tuple[Tunnel, TlsSocket]) -> None:
    """The goodbye is octets to the kernel; it must not pass for something said."""
    tunnel, tls = parked
    assert tunnel.parked == 1
    tls.finish()
    assert tls.flush()
    while tunnel.parked:
        await trio.lowlevel.checkpoint()


async def test_a_hidden_server_that_is_cut_off_is_not_parked_any_more(parked: tuple[Tunnel, TlsSocket]) -> None:
    tunnel, tls = parked
    tls.connection.shutdown(socket.SHUT_WR)
    while tunnel.parked:
        await trio.lowlevel.checkpoint()


def test_keys_are_for_servers_of_tunnels() -> None:
    assert Endpoint.parse("tls://h:1/abc") == Endpoint("tls", "h", 1, "abc")
    assert Endpoint.parse("tls://h:1/abc").without_key == "tls://h:1/..."


class AfterWaiting(trio.abc.Instrument):
    """Does something once what was waited for is there, and before anybody has had a look at it."""

    def __init__(self, do: Callable[[], None]) -> None:
        self._do = do

    def after_io_wait(self, timeout: float) -> None:
        trio.lowlevel.remove_instrument(self)
        self._do()


@BOTH
async def test_who_shows_the_key_in_the_moment_in_which_the_tunnel_closes_is_not_parked_for_ever(
    service: TunnelService, papers: Papers, gate: Authenticator, secure: str
) -> None:
    tunnel = await open_tunnel(service, secure=secure)
    side = tunnel._server_side
    with trio.fail_after(PATIENT):
        stream = await connect(tunnel.server_uri)
        await until_strangers(gate, 1)
        key = f"{tunnel.server_uri.key}\n".encode()
        if secure == "yes":
            tls = TlsSocket(raw(stream), papers.client, server_hostname="localhost")
            await tls.shake_hands()
            await wait_all_tasks_blocked()
            tls.write(memoryview(key))
            tls.flush()
        else:
            await wait_all_tasks_blocked()
            raw(stream).send(key)
        trio.lowlevel.add_instrument(AfterWaiting(side.close))
        await until_strangers(gate, 0)
        assert side.parked == 0
        assert b"OK" not in await read_all(stream)


async def test_who_does_not_manage_the_handshake_has_failed(service: TunnelService, gate: Authenticator) -> None:
    tunnel = await open_tunnel(service, secure="yes")
    for _ in range(3):
        assert gate.penalty("127.0.0.1") == 0
        async with await connect(tunnel.server_uri) as stream:
            await stream.send_all(b"\x16\x03\x01\x00\x05nonsense")
            with suppress(trio.BrokenResourceError):
                await read_all(stream)  # an alert
        await until_strangers(gate, 0)
    assert gate.penalty("127.0.0.1") > 0
