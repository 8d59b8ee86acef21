"""The local server by a name: its addresses change, and the name is looked up again."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from tunneld.agent.local import REFRESH, LocalServer
from tunneld.net.endpoint import Target


class Names(trio.abc.HostnameResolver):
    """A name service of one name, and how often it was asked."""

    def __init__(self) -> None:
        self.addresses = ["127.0.0.1"]
        self.asked = 0

    async def getaddrinfo(self, host: Any, port: Any, *_: Any, **__: Any) -> Any:
        self.asked += 1
        if not self.addresses:
            raise socket.gaierror(socket.EAI_AGAIN, "no answer")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in self.addresses]

    async def getnameinfo(self, sockaddr: Any, flags: int) -> Any:
        raise NotImplementedError


@pytest.fixture
async def names() -> Names:
    names = Names()
    trio.socket.set_custom_hostname_resolver(names)
    return names


@pytest.fixture
def server() -> Iterator[LocalServer]:
    """One that is known by a name, and listens at all addresses of this machine."""
    with socket.create_server(("0.0.0.0", 0)) as listener:
        yield LocalServer(Target.parse(f"web.example.org:{listener.getsockname()[1]}"))


def reached(connection: socket.socket) -> str:
    """Which address that connection goes to."""
    with connection:
        return str(connection.getpeername()[0])


async def test_a_server_that_moved_is_found_again(mock_clock: MockClock, names: Names, server: LocalServer) -> None:
    assert reached(await server.dial()) == "127.0.0.1"
    names.addresses = ["127.0.0.2"]
    assert reached(server.dial_nowait()) == "127.0.0.1", "it is remembered"
    mock_clock.jump(REFRESH + 1)
    with pytest.raises(trio.WouldBlock):
        server.dial_nowait()
    assert reached(await server.dial()) == "127.0.0.2"
    assert reached(server.dial_nowait()) == "127.0.0.2"
    assert names.asked == 2


async def test_a_name_service_that_is_away_costs_nobody_a_server_that_is_there(
    mock_clock: MockClock, names: Names, server: LocalServer
) -> None:
    assert reached(await server.dial()) == "127.0.0.1"
    names.addresses = []
    mock_clock.jump(REFRESH + 1)
    assert reached(await server.dial()) == "127.0.0.1"
    assert reached(server.dial_nowait()) == "127.0.0.1"
    assert names.asked == 2


async def test_of_several_addresses_the_one_that_works_is_kept_until_it_refuses(names: Names) -> None:
    names.addresses = ["127.0.0.3", "127.0.0.2"]
    with socket.create_server(("127.0.0.2", 0)) as listener:
        server = LocalServer(Target.parse(f"web.example.org:{listener.getsockname()[1]}"))
        with pytest.raises(trio.WouldBlock):
            server.dial_nowait()
        assert reached(await server.dial()) == "127.0.0.2"
        assert reached(server.dial_nowait()) == "127.0.0.2"
        server.failed()
        with pytest.raises(trio.WouldBlock):
            server.dial_nowait()


async def test_a_name_that_means_nothing_is_an_error(names: Names) -> None:
    names.addresses = []
    with pytest.raises(OSError, match="no answer") as failure:
        await LocalServer(Target.parse("web.example.org:1")).dial()
    assert failure.value.errno != errno.ECONNREFUSED
