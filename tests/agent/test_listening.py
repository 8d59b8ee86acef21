"""Somebody exposes a port on which nothing listens, and is told before a visitor comes."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from tests.agent.support import PATIENCE, Told, echo, exposed, local_server, relay_here, unused_port
from tests.agent.test_expose import address, ask
from tests.support.system import lacking
from tunneld.agent import local
from tunneld.agent.local import complaint
from tunneld.net.endpoint import Target

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")


@contextmanager
def listener(host: str, family: socket.AddressFamily = socket.AF_INET) -> Iterator[int]:
    """A port on which something listens."""
    try:
        bound = socket.create_server((host, 0), family=family)
    except OSError:
        lacking(f"{host} is not an address of this machine")
    with bound:
        yield int(bound.getsockname()[1])


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
def test_where_something_listens_nothing_is_said(host: str, targets: tuple[str, ...]) -> None:
    with listener(host, socket.AF_INET6 if ":" in host else socket.AF_INET) as port:
        for target in targets:
            assert complaint(Target(target, port)) is None


def test_where_nothing_does_that_is_said() -> None:
    port = unused_port()
    for host in ("127.0.0.1", "localhost"):
        why = f"nothing listens on {host}:{port} yet: visitors are turned away until something does"
        assert complaint(Target(host, port)) == why


def test_a_server_at_another_address_is_named() -> None:
    with listener("::1", socket.AF_INET6) as port:
        why = f"nothing listens on 127.0.0.1:{port}, but on [::1]:{port}; is that meant?"
        assert complaint(Target("127.0.0.1", port)) == why


def test_a_socket_that_is_not_there_is_said_to_be_missing(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    assert complaint(Target(path=str(path))) == f"no socket is at {path} yet: visitors are turned away until one is"
    with socket.socket(socket.AF_UNIX) as there:
        there.bind(str(path))
        assert complaint(Target(path=str(path))) is None


def test_of_what_nobody_can_know_nothing_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert complaint(Target("192.0.2.1", 80)) is None
    odd = tmp_path / "tcp"
    odd.write_text("a table\nof another kind\n")
    monkeypatch.setattr(local, "TABLES", (odd,))
    assert complaint(Target("127.0.0.1", 80)) is None


async def test_it_is_told_at_the_start_and_a_browser_is_answered_until_the_server_is_there() -> None:
    told, port = Told(), unused_port()
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay, exposed(Target("127.0.0.1", port), relay.access, told, scheme="http"):
            assert f"nothing listens on 127.0.0.1:{port} yet" in str((await told.wait_for("trouble"))["reason"])
            answer = await ask(address(told), b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 503 ")
            assert "connection refused" in str((await told.wait_for("failed"))["reason"])
            listeners = await trio.open_tcp_listeners(port, host="127.0.0.1")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.serve_listeners, echo, listeners)
                assert await ask(address(told), b"hello") == b"hello"
                nursery.cancel_scope.cancel()


async def test_where_there_is_a_server_nothing_is_told() -> None:
    told = Told()
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay, local_server(echo) as target, exposed(target, relay.access, told):
            assert await ask(address(told), b"hello") == b"hello"
    assert not told.all("trouble")
