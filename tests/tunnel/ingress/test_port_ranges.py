"""Tunnels with several public ports: consecutive where possible, all or none, and kept for the next of the name."""

from __future__ import annotations

import socket

import pytest

from tests.support.peers import connect, is_refused, read_exactly
from tests.support.visitors import open_tunnel
from tunneld.config.schema import TunnelSettings
from tunneld.directory.service import TunnelService
from tunneld.errors import LimitReachedError, UsageError
from tunneld.net.address import Port
from tunneld.net.endpoint import Endpoint
from tunneld.policy.options import MAX_TUNNEL_PORTS, TunnelOptions
from tunneld.tunnel.ingress.port import open_ports
from tunneld.tunnel.server_side import NO_TAKEOVER
from tunneld.tunnel.spec import TunnelSpec
from tunneld.tunnel.tunnel import Tunnel
from tunneld.wire.proxy_protocol import COMMON_V2, decode_v2


def ports(tunnel: Tunnel) -> list[int]:
    return [address.number for address in tunnel.addresses if isinstance(address, Port)]


def run_of_free_ports(count: int) -> int:
    """The first of so many free ports in a row."""
    while True:
        held: list[socket.socket] = []
        try:
            for index in range(count):
                held.append(one := socket.socket())
                one.bind(("127.0.0.1", held[0].getsockname()[1] + index if index else 0))
            return int(held[0].getsockname()[1])
        except (OSError, OverflowError):
            continue
        finally:
            for one in held:
                one.close()


async def test_the_ports_are_consecutive_and_the_header_tells_which_was_reached(service: TunnelService) -> None:
    tunnel = await open_tunnel(service, port_count="5", proxy_protocol="v2", persist="yes")
    first = ports(tunnel)[0]
    assert ports(tunnel) == list(range(first, first + 5))
    assert tunnel.client_uri.port == first
    for port in ports(tunnel):
        server = await connect(tunnel.server_uri)
        await connect(Endpoint("tcp", "127.0.0.1", port))
        decoded = decode_v2(await read_exactly(server, COMMON_V2))
        assert decoded is not None
        assert decoded[0].destination == ("127.0.0.1", port)


async def test_all_ports_close_with_the_tunnel(service: TunnelService) -> None:
    tunnel = await open_tunnel(service, port_count="3")
    await service.close(tunnel.id)
    assert [await is_refused(Endpoint("tcp", "127.0.0.1", port)) for port in ports(tunnel)] == [True] * 3


async def test_where_one_of_the_requested_ports_is_taken_none_is_opened(service: TunnelService) -> None:
    first = run_of_free_ports(3)
    with socket.socket() as other:
        other.bind(("127.0.0.1", first + 2))
        other.listen()
        with pytest.raises(LimitReachedError):
            await open_tunnel(service, port_count="3", client_port=str(first))
        assert await is_refused(Endpoint("tcp", "127.0.0.1", first))
    tunnel = await open_tunnel(service, port_count="3", client_port=str(first))
    assert ports(tunnel) == [first, first + 1, first + 2]


async def test_a_named_tunnel_gets_all_its_ports_again(service: TunnelService) -> None:
    tunnel = await open_tunnel(service, port_count="3", name="game")
    former = ports(tunnel)
    successor = await open_tunnel(service, port_count="3", name="game")
    assert ports(successor) == former
    await service.close(successor.id, keep=True)
    assert ports(await open_tunnel(service, port_count="3", name="game")) == former


def opened(first: int, size: int, count: int) -> list[int]:
    """The ports that a tunnel gets out of a range; they are closed again."""
    settings = TunnelSettings(host="127.0.0.1", ports=f"{first}-{first + size - 1}")
    options = TunnelOptions(port_count=count)
    spec = TunnelSpec("t1", "tcp", options, settings, "alice", "127.0.0.1", "127.0.0.1")
    made = open_ports(spec, spec.limits, (), NO_TAKEOVER)
    for one in made:
        one.close()
    return [one.address.number for one in made if isinstance(one.address, Port)]


def test_without_a_row_of_free_ports_any_will_do() -> None:
    first = run_of_free_ports(6)
    with socket.socket() as other:
        other.bind(("127.0.0.1", first + 3))
        other.listen()
        assert opened(first, 6, 3) == [first, first + 1, first + 2]
        assert sorted(opened(first, 6, 5)) == [first, first + 1, first + 2, first + 4, first + 5]


def test_more_ports_than_there_are_leave_nothing_open() -> None:
    first = run_of_free_ports(4)
    with pytest.raises(LimitReachedError):
        opened(first, 4, 5)
    assert opened(first, 4, 4) == [first, first + 1, first + 2, first + 3]


@pytest.mark.parametrize(
    "words",
    [
        {"port_count": "0"},
        {"port_count": str(MAX_TUNNEL_PORTS + 1)},
        {"port_count": "2", "host": "blog"},
        {"port_count": "2", "client_port": "65535"},
    ],
    ids=str,
)
def test_other_counts_are_refused(words: dict[str, str]) -> None:
    with pytest.raises(UsageError):
        TunnelOptions.parse(words)


def test_the_last_port_is_a_port() -> None:
    assert list(TunnelOptions.parse({"port_count": "2", "client_port": "65534"}).requested_ports) == [65534, 65535]
    assert TunnelOptions.parse({"port_count": str(MAX_TUNNEL_PORTS)}).port_count == MAX_TUNNEL_PORTS
