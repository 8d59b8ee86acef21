"""Opening is all or nothing: a tunnel that would be replaced serves until nothing can fail any more."""

from __future__ import annotations

import hashlib
import random
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trio

from tests.support.peers import connect, is_dropped, is_refused, read_exactly
from tests.support.visitors import until_parked, until_served, until_waiting
from tunneld.backends import BACKENDS
from tunneld.config.schema import Settings, TunnelSettings
from tunneld.directory.local import LocalDirectory
from tunneld.directory.record import AddressClaim, TunnelRecord
from tunneld.directory.requester import Requester
from tunneld.directory.service import TunnelService
from tunneld.engine.engine import Engine
from tunneld.errors import LimitReachedError, NotAllowedError, ShortageError, StoreError, TunneldError, UsageError
from tunneld.net.sockets import open_descriptors
from tunneld.policy.access import Grant
from tunneld.policy.options import TunnelOptions
from tunneld.tunnel.keys import KeyRegistry
from tunneld.tunnel.server_side import BackendServices, ServerSide, TunnelContext
from tunneld.tunnel.tunnel import Phase, Tunnel

ALICE = Grant("alice", backends=("tcp", "webmux"), max_visitors=100, ports=(range(1, 60_000),), max_tunnels=3)
CHUNK = 8192


class BrokenBackend:
    """A backend without a free descriptor, once it was told so."""

    def __init__(self) -> None:
        self.broken = False

    def __call__(self, context: TunnelContext, /) -> ServerSide:
        if self.broken:
            raise ShortageError("could not listen: too many open files")
        return BACKENDS["tcp"](context)

    def check(self, services: BackendServices, options: TunnelOptions, /) -> None:
        BACKENDS["tcp"].check(services, options)

    def is_encrypted(self, services: BackendServices, options: TunnelOptions, /) -> bool:
        return BACKENDS["tcp"].is_encrypted(services, options)


@pytest.fixture
def backend() -> BrokenBackend:
    return BrokenBackend()


@pytest.fixture
async def service(nursery: trio.Nursery, engine: Engine, backend: BrokenBackend) -> TunnelService:
    keys = KeyRegistry()
    keys.set_port("webmux", "webmux", 7012)
    settings = Settings(tunnels=TunnelSettings(ports="0"))
    service = TunnelService(lambda: settings, engine, {**BACKENDS, "tcp": backend}, keys)
    await nursery.start(service.run)
    return service


async def open_as(service: TunnelService, backend: str = "tcp", grant: Grant = ALICE, **words: str) -> Tunnel:
    requester = Requester("127.0.0.1", "127.0.0.1:9", "127.0.0.1", grant)
    options = TunnelOptions.parse({"name": "web", "persist": "yes", **words})
    return await service.open_tunnel(backend, options, requester)


class Download:
    """A visitor of a tunnel in the middle of a download; every byte of it is compared."""

    def __init__(self, server: trio.SocketStream, visitor: trio.SocketStream) -> None:
        self._server, self._visitor = server, visitor
        self._random = random.Random(1)
        self._sent, self._received = hashlib.sha256(), hashlib.sha256()

    async def advance(self) -> None:
        data = self._random.randbytes(CHUNK)
        self._sent.update(data)
        await self._server.send_all(data)
        self._received.update(await read_exactly(self._visitor, CHUNK))
        assert self._sent.digest() == self._received.digest()

    async def is_cut(self) -> bool:
        return await is_dropped(self._visitor)


@asynccontextmanager
async def download_from(tunnel: Tunnel) -> AsyncIterator[Download]:
    before = tunnel.served
    server, visitor = await connect(tunnel.server_uri), await connect(tunnel.client_uri)
    await until_served(tunnel, before + 1)
    download = Download(server, visitor)
    await download.advance()
    yield download
    await server.aclose()
    await visitor.aclose()


class FailingDirectory:
    """Fails instead of entering a tunnel, as a directory on other machines may."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Exception | None) -> None:
        monkeypatch.setattr(LocalDirectory, "open", self.open)
        self.error = error

    async def open(self, _record: TunnelRecord, _claim: AddressClaim | None = None) -> None:
        await trio.lowlevel.checkpoint()
        if self.error is not None:
            raise self.error
        await trio.sleep_forever()


async def fail_at_the_options(service: TunnelService, *_: object) -> None:
    await open_as(service, max_visitors="101")


async def fail_at_the_backend(service: TunnelService, *_: object) -> None:
    await open_as(service, "nonsense")


async def fail_at_the_certificate(service: TunnelService, *_: object) -> None:
    await open_as(service, "webmux", secure="yes")


async def fail_at_the_grant(service: TunnelService, *_: object) -> None:
    await open_as(service, client_port="60001")


async def fail_at_the_port(service: TunnelService, *_: object) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        await open_as(service, client_port=str(other.getsockname()[1]))


async def fail_at_the_server_side(service: TunnelService, backend: BrokenBackend, *_: object) -> None:
    backend.broken = True
    try:
        await open_as(service)
    finally:
        backend.broken = False


async def fail_at_the_directory(
    service: TunnelService, _backend: BrokenBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        FailingDirectory(patch, StoreError("the directory does not answer"))
        await open_as(service)


async def fail_at_the_number_of_tunnels(service: TunnelService, *_: object) -> None:
    others = [await open_as(service, name=name) for name in ("one", "two")]
    try:
        await open_as(service, name="three")
    finally:
        for other in others:
            await service.close(other.id)


FAILURES: dict[Callable[..., object], type[TunneldError]] = {
    fail_at_the_options: UsageError,
    fail_at_the_backend: UsageError,
    fail_at_the_certificate: UsageError,
    fail_at_the_grant: NotAllowedError,
    fail_at_the_port: LimitReachedError,
    fail_at_the_server_side: ShortageError,
    fail_at_the_directory: StoreError,
    fail_at_the_number_of_tunnels: LimitReachedError,
}


@pytest.mark.parametrize("fail", FAILURES, ids=lambda fail: fail.__name__)
async def test_a_tunnel_that_could_not_be_replaced_serves_as_before(
    service: TunnelService,
    backend: BrokenBackend,
    monkeypatch: pytest.MonkeyPatch,
    fail: Callable[..., object],
) -> None:
    tunnel = await open_as(service)
    addresses = tunnel.client_uri, tunnel.server_uri
    async with download_from(tunnel) as download:
        before = open_descriptors()
        for _ in range(3):
            with pytest.raises(FAILURES[fail]):
                await fail(service, backend, monkeypatch)  # type: ignore[misc]
            await download.advance()
        assert open_descriptors() == before
        assert list(service.tunnels()) == [tunnel]
        assert [each.uid for each in await service.directory.list()] == [tunnel.spec.uid]
        assert [(kept.record.addresses, kept.tunnel) for kept in service.reservations.kept(ALICE)] == [
            (tunnel.addresses, tunnel.id)
        ]
        async with download_from(tunnel) as another:  # new ones are served as well
            await another.advance()
    assert (tunnel.phase is Phase.CLOSED, (tunnel.client_uri, tunnel.server_uri)) == (False, addresses)


async def test_a_request_that_is_cancelled_before_the_commit_changes_nothing(
    service: TunnelService, monkeypatch: pytest.MonkeyPatch
) -> None:
    tunnel = await open_as(service)
    async with download_from(tunnel) as download:
        before = open_descriptors()
        with monkeypatch.context() as patch, trio.CancelScope() as scope:
            FailingDirectory(patch, None)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(open_as, service)
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
        await download.advance()
        assert (open_descriptors(), list(service.tunnels())) == (before, [tunnel])


@pytest.mark.parametrize("backend_name", ["tcp", "webmux"])
async def test_a_new_tunnel_has_the_address_and_the_key_of_the_one_that_it_replaces(
    service: TunnelService, backend_name: str
) -> None:
    first = await open_as(service, backend_name)
    second = await open_as(service, backend_name)
    assert (second.client_uri, second.server_uri) == (first.client_uri, first.server_uri)
    assert (first.phase, first.reason) == (Phase.CLOSED, "replaced by a new tunnel of the same name and owner")
    records = await service.directory.list()
    assert [(each.id, each.generation) for each in records] == [(second.id, 2)]
    assert records[0].uid not in {"", first.spec.uid}
    if backend_name == "webmux":
        found: object = service.keys.find(second.server_uri.key)
        assert found is second.server_side
    await service.close(second.id)
    assert service.keys.find(second.server_uri.key) is None


async def test_visitors_of_a_replaced_tunnel_are_cut_and_new_ones_served(service: TunnelService) -> None:
    first = await open_as(service)
    async with download_from(first) as download:
        second = await open_as(service)
        assert await download.is_cut()
        async with download_from(second) as another:
            await another.advance()


async def test_visitors_are_never_refused_while_a_tunnel_is_replaced(service: TunnelService) -> None:
    """Both ports have a listener all the time."""
    tunnel = await open_as(service)
    replaced = trio.Event()
    tries = 0

    async def connect_again_and_again() -> None:
        nonlocal tries
        while not replaced.is_set():
            for uri in (tunnel.client_uri, tunnel.server_uri):
                stream = await connect(uri)
                await stream.aclose()
            tries += 1
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(connect_again_and_again)
        for _ in range(20):
            await open_as(service)
        replaced.set()
    assert tries


@pytest.mark.interpreted
async def test_a_visitor_that_connects_between_two_tunnels_is_served_by_the_new_one(service: TunnelService) -> None:
    first = await open_as(service)
    visitors: list[trio.SocketStream] = []
    give_way = first.give_way

    def give_way_and_connect(successor: Tunnel, reason: str) -> None:
        give_way(successor, reason)
        client = socket.create_connection(("127.0.0.1", first.client_uri.port))
        client.setblocking(False)
        visitors.append(trio.SocketStream(trio.socket.from_stdlib_socket(client)))

    first.give_way = give_way_and_connect  # type: ignore[method-assign]
    second = await open_as(service)
    server = await connect(second.server_uri)
    await server.send_all(b"hello")
    assert await read_exactly(visitors[0], 5) == b"hello"
    for stream in (server, *visitors):
        await stream.aclose()


async def test_a_visitor_that_waits_while_its_tunnel_is_replaced_is_served_by_the_new_one(
    service: TunnelService,
) -> None:
    first = await open_as(service)
    visitor = await connect(first.client_uri)
    await visitor.send_all(b"request")
    await until_waiting(first, 1)
    second = await open_as(service)
    assert first.waiting == 0
    server = await connect(second.server_uri)
    assert await read_exactly(server, 7) == b"request"
    await server.send_all(b"hello")
    assert await read_exactly(visitor, 5) == b"hello"


async def test_visitors_of_a_tunnel_that_is_replaced_and_never_started_are_refused(service: TunnelService) -> None:
    first, second = await open_as(service), await open_as(service, name="other")
    visitor = await connect(first.client_uri)
    await until_waiting(first, 1)
    second.arrivals.inherit(first.arrivals)
    second.arrivals.discard()
    assert await is_dropped(visitor)


async def test_a_tunnel_that_is_replaced_before_it_began_leaves_nothing_behind(service: TunnelService) -> None:
    first = await open_as(service)
    before = open_descriptors()
    opened: list[Tunnel] = []

    async def open_one() -> None:
        opened.append(await open_as(service))

    for _ in range(3):
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(open_one)
    (last,) = service.tunnels()
    assert {tunnel.client_uri for tunnel in opened} == {first.client_uri}
    assert (last.phase, open_descriptors()) == (Phase.WAITING, before)
    assert [each.id for each in await service.directory.list()] == [last.id]
    await service.close(last.id)
    assert await is_refused(last.client_uri)


async def test_a_tunnel_that_moves_to_another_port_leaves_the_old_one(service: TunnelService) -> None:
    first = await open_as(service)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    second = await open_as(service, client_port=str(port))
    assert second.client_uri.port == port
    assert second.server_uri == first.server_uri
    assert await is_refused(first.client_uri)


async def test_the_ports_of_the_two_sides_can_be_exchanged(service: TunnelService) -> None:
    """The new tunnel asks for the port on which the old one's hidden server connects."""
    first = await open_as(service)
    second = await open_as(service, client_port=str(first.server_uri.port))
    assert second.client_uri.port == first.server_uri.port
    assert second.server_uri.port != second.client_uri.port
    async with download_from(second) as download:
        await download.advance()


async def test_a_tunnel_on_another_host_gets_the_same_port(service: TunnelService) -> None:
    first = await open_as(service)
    service.settings = lambda: Settings(tunnels=TunnelSettings(ports="0", host="0.0.0.0"))
    second = await open_as(service)
    assert (second.client_uri.port, second.server_uri.port) == (first.client_uri.port, first.server_uri.port)
    server = await connect(second.server_uri)
    await until_parked(second, 1)
    await server.aclose()


async def test_requests_for_other_names_do_not_wait(service: TunnelService, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, trio.CancelScope() as scope:
        FailingDirectory(patch, None)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(open_as, service)
            await trio.testing.wait_all_tasks_blocked()
            patch.undo()
            await open_as(service, name="other")
            scope.cancel()


async def test_no_tunnel_is_opened_after_a_wait_in_which_a_drain_began(service: TunnelService) -> None:
    await open_as(service)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(open_as, service)
        service.draining = True
        with pytest.raises(TunneldError, match="draining"):
            await open_as(service)
        service.draining = False
