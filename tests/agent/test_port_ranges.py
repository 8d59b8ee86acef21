"""`tunnel expose 5000-5010`: one tunnel with as many public ports, each of which leads to its local server."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from tests.agent.support import PATIENCE, RecordingReporter, exposed, relay_here, using_backend
from tests.agent.test_config import problems, read
from tests.support.peers import connect, read_all
from tunneld.agent.request import TunnelRequest
from tunneld.cli.reporters import public_address
from tunneld.errors import UsageError
from tunneld.net.address import format_ports, parse_ports
from tunneld.net.endpoint import Endpoint, Target
from tunneld.policy.options import MAX_TUNNEL_PORTS


@pytest.fixture
def row() -> Iterator[list[socket.socket]]:
    """Three listeners at ports in a row."""
    while True:
        held: list[socket.socket] = []
        try:
            for index in range(3):
                held.append(one := socket.socket())
                one.bind(("127.0.0.1", held[0].getsockname()[1] + index if index else 0))
                one.listen()
            break
        except (OSError, OverflowError):
            for one in held:
                one.close()
    yield held
    for one in held:
        one.close()


async def greet(listener: socket.socket) -> None:
    """Tell each visitor the port."""
    with trio.socket.from_stdlib_socket(listener.dup()) as accepting:
        while True:
            connection, _ = await accepting.accept()
            with connection:
                await connection.send(str(listener.getsockname()[1]).encode())


@pytest.mark.parametrize("backend", ["tcp", "webmux"])
async def test_each_public_port_leads_to_its_local_server(backend: str, row: list[socket.socket]) -> None:
    reporter, first = RecordingReporter(), row[0].getsockname()[1]
    target = Target("127.0.0.1", first, count=3)
    with trio.fail_after(PATIENCE), using_backend(backend):
        async with trio.open_nursery() as nursery, relay_here() as relay:
            for listener in row:
                listener.setblocking(False)
                nursery.start_soon(greet, listener)
            request = TunnelRequest({"port_count": 3}, backend=backend)
            async with exposed(target, relay.access, reporter, request):
                public = parse_ports(str(reporter.all("opened")[0]["ports"]), 3)
                for index, port in enumerate(public):
                    visitor = await connect(Endpoint("tcp", "127.0.0.1", port))
                    assert int(await read_all(visitor)) == first + index
            nursery.cancel_scope.cancel()


async def test_a_relay_that_hides_the_port_is_no_reason_to_guess(row: list[socket.socket]) -> None:
    reporter = RecordingReporter()
    target = Target("127.0.0.1", row[0].getsockname()[1], count=3)
    with trio.fail_after(PATIENCE):
        async with (
            relay_here() as relay,
            exposed(target, relay.access, reporter, TunnelRequest({"port_count": 3})) as exposure,
        ):
            exposure._visitors.public_ports = ()
            await connect(relay.tunnel.client_uri)
            failed = await reporter.wait_for("failed")
            assert failed["reason"] == "the relay did not tell to which of the ports the visitor came"


@pytest.mark.parametrize(
    ("text", "target", "shown"),
    [
        ("5000-5010", Target("127.0.0.1", 5000, count=11), "127.0.0.1:5000-5010"),
        ("web:80-80", Target("web", 80), "web:80"),
        ("[::1]:1-2", Target("::1", 1, count=2), "[::1]:1-2"),
    ],
)
def test_a_target_may_have_a_range_of_ports(text: str, target: Target, shown: str) -> None:
    assert (Target.parse(text), str(target)) == (target, shown)
    assert [one.port for one in target.each] == list(range(target.port, target.port + target.count))


@pytest.mark.parametrize("text", ["5010-5000", "0-3", "1-65536", "1-", "-1", "a-b", "1-2-3"])
def test_other_ranges_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        Target.parse(text)


def test_a_range_is_bounded_and_has_ports_only(tmp_path: Path) -> None:
    table = "[expose.a]\ntarget = '{}'\n{}"
    found = read(tmp_path, table.format(f"1-{MAX_TUNNEL_PORTS}", ""))
    assert found["a"].request.options["port_count"] == MAX_TUNNEL_PORTS
    (problem,) = problems(tmp_path, table.format(f"1-{MAX_TUNNEL_PORTS + 1}", ""))
    assert problem.endswith("1-101 has 101 ports; a tunnel has at most 100")
    (problem,) = problems(tmp_path, table.format("1-2", "host = 'blog'"))
    assert problem.endswith("host is for one local server; leave it out, or name one port")


@pytest.mark.parametrize(("ports", "text"), [([1, 2, 3], "1-3"), ([7, 1, 2, 9], "7,1-2,9"), ([5], "5")])
def test_lists_of_ports_are_printed_with_ranges(ports: list[int], text: str) -> None:
    assert (format_ports(ports), parse_ports(text, 4)) == (text, ports)


@pytest.mark.parametrize("text", ["", "1-5", "0", "65536", "2-1", "x", "1,,2", "1-1000000000"])
def test_a_relay_cannot_send_more_ports_than_there_may_be(text: str) -> None:
    with pytest.raises(ValueError, match="port"):
        parse_ports(text, 4)


def test_the_address_has_all_ports() -> None:
    assert public_address("tcp://[::1]:80", "tcp", "80-82") == "tcp://[::1]:80-82"
