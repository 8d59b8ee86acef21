"""The local server: dialled by name, whose addresses change, and the warning if nothing listens there."""

from __future__ import annotations

import errno
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from tests.agent.support import PATIENCE, RecordingReporter, echo, exposed, local_server, relay_here, unused_port
from tests.agent.test_expose import address, ask
from tests.support.system import lacking
from tunneld.agent import local
from tunneld.agent.local import RESOLVE_INTERVAL, LocalServer, why_nothing_listens
from tunneld.net.endpoint import Target

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="only Linux lists listening sockets")


class FakeResolver(trio.abc.HostnameResolver):
    """Resolves every name to `addresses`, and counts the lookups."""

    def __init__(self) -> None:
        self.addresses = ["127.0.0.1"]
        self.lookups = 0

    async def getaddrinfo(self, host: Any, port: Any, *_: Any, **__: Any) -> Any:
        self.lookups += 1
        if not self.addresses:
            raise socket.gaierror(socket.EAI_AGAIN, "no answer")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in self.addresses]

    async def getnameinfo(self, sockaddr: Any, flags: int) -> Any:
        raise NotImplementedError


@pytest.fixture
async def resolver() -> FakeResolver:
    resolver = FakeResolver()
    trio.socket.set_custom_hostname_resolver(resolver)
    return resolver


@pytest.fixture
def server() -> Iterator[LocalServer]:
    """A server that has a name and listens at all addresses of this machine."""
    with socket.create_server(("0.0.0.0", 0)) as listener:
        yield LocalServer(Target.parse(f"web.example.org:{listener.getsockname()[1]}"))


def reached(connection: socket.socket) -> str:
    """The address that a connection goes to; closes it."""
    with connection:
        return str(connection.getpeername()[0])


async def test_a_server_that_moved_is_found_again(
    mock_clock: MockClock, resolver: FakeResolver, server: LocalServer
) -> None:
    assert reached(await server.dial()) == "127.0.0.1"
    resolver.addresses = ["127.0.0.2"]
    assert reached(server.dial_nowait()) == "127.0.0.1", "not resolved again yet"
    mock_clock.jump(RESOLVE_INTERVAL + 1)
    with pytest.raises(trio.WouldBlock):
        server.dial_nowait()
    assert reached(await server.dial()) == "127.0.0.2"
    assert reached(server.dial_nowait()) == "127.0.0.2"
    assert resolver.lookups == 2


async def test_a_failed_lookup_keeps_the_known_address(
    mock_clock: MockClock, resolver: FakeResolver, server: LocalServer
) -> None:
    assert reached(await server.dial()) == "127.0.0.1"
    resolver.addresses = []
    mock_clock.jump(RESOLVE_INTERVAL + 1)
    assert reached(await server.dial()) == "127.0.0.1"
    assert reached(server.dial_nowait()) == "127.0.0.1"
    assert resolver.lookups == 2


async def test_the_address_that_works_is_kept_until_it_refuses(resolver: FakeResolver) -> None:
    resolver.addresses = ["127.0.0.3", "127.0.0.2"]
    with socket.create_server(("127.0.0.2", 0)) as listener:
        server = LocalServer(Target.parse(f"web.example.org:{listener.getsockname()[1]}"))
        with pytest.raises(trio.WouldBlock):
            server.dial_nowait()
        assert reached(await server.dial()) == "127.0.0.2"
        assert reached(server.dial_nowait()) == "127.0.0.2"
        server.on_refused()
        with pytest.raises(trio.WouldBlock):
            server.dial_nowait()


async def test_a_name_that_does_not_resolve_is_an_error(resolver: FakeResolver) -> None:
    resolver.addresses = []
    with pytest.raises(OSError, match="no answer") as failure:
        await LocalServer(Target.parse("web.example.org:1")).dial()
    assert failure.value.errno != errno.ECONNREFUSED


# Whether anything listens


@contextmanager
def listener(host: str, family: socket.AddressFamily = socket.AF_INET) -> Iterator[int]:
    """Listen on a free port of this address; yields the port."""
    with socket.socket(family) as bound:
        try:
            if family is socket.AF_INET6:  # an IPv4-mapped address needs a socket for both
                bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(not host.startswith("::ffff:")))
            bound.bind((host, 0))
            bound.listen()
        except OSError:
            lacking(f"{host} is not an address of this machine")
        yield int(bound.getsockname()[1])


@linux_only
@pytest.mark.parametrize(
    ("host", "targets"),
    [
        ("127.0.0.1", ("127.0.0.1", "localhost")),
        ("127.0.0.2", ("127.0.0.2", "localhost")),
        ("0.0.0.0", ("127.0.0.1", "127.0.0.2", "localhost")),
        ("::1", ("::1", "localhost")),
        ("::", ("::1", "127.0.0.1", "localhost")),
        ("::ffff:127.0.0.1", ("127.0.0.1", "localhost")),
    ],
)
def test_a_target_with_a_listener_causes_no_warning(host: str, targets: tuple[str, ...]) -> None:
    with listener(host, socket.AF_INET6 if ":" in host else socket.AF_INET) as port:
        for target in targets:
            assert why_nothing_listens(Target(target, port)) is None


@linux_only
def test_a_target_without_a_listener_causes_a_warning() -> None:
    port = unused_port()
    for host in ("127.0.0.1", "localhost"):
        why = f"nothing listens on {host}:{port}; start the local server: until then visitors are turned away"
        assert why_nothing_listens(Target(host, port)) == why


@linux_only
def test_a_server_at_another_address_is_named() -> None:
    with listener("::1", socket.AF_INET6) as port:
        why = (
            f"nothing listens on 127.0.0.1:{port}, only on [::1]:{port}; "
            "if that is the local server, use its address as the target"
        )
        assert why_nothing_listens(Target("127.0.0.1", port)) == why


@linux_only
def test_a_missing_unix_socket_causes_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    why = f"there is no socket at {path}; start the local server: until then visitors are turned away"
    assert why_nothing_listens(Target(path=str(path))) == why
    with socket.socket(socket.AF_UNIX) as there:
        there.bind(str(path))
        assert why_nothing_listens(Target(path=str(path))) is None


@linux_only
def test_an_unknown_state_causes_no_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert why_nothing_listens(Target("192.0.2.1", 80)) is None
    odd = tmp_path / "tcp"
    odd.write_text("a table\nof another kind\n")
    monkeypatch.setattr(local, "SOCKET_TABLES", (odd,))
    assert why_nothing_listens(Target("127.0.0.1", 80)) is None


@linux_only
async def test_it_is_reported_at_the_start_and_a_browser_is_answered_until_the_server_is_up() -> None:
    reporter, port = RecordingReporter(), unused_port()
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay, exposed(Target("127.0.0.1", port), relay.access, reporter, scheme="http"):
            assert f"nothing listens on 127.0.0.1:{port};" in str((await reporter.wait_for("trouble"))["reason"])
            answer = await ask(address(reporter), b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 503 ")
            assert "connection refused" in str((await reporter.wait_for("failed"))["reason"])
            listeners = await trio.open_tcp_listeners(port, host="127.0.0.1")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.serve_listeners, echo, listeners)
                assert await ask(address(reporter), b"hello") == b"hello"
                nursery.cancel_scope.cancel()


@linux_only
async def test_with_a_server_no_trouble_is_reported() -> None:
    reporter = RecordingReporter()
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay, local_server(echo) as target, exposed(target, relay.access, reporter):
            assert await ask(address(reporter), b"hello") == b"hello"
    assert not reporter.all("trouble")
