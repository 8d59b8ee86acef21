"""What the kernel tells of a silent connection."""

from __future__ import annotations

import math
import socket
import sys
from collections.abc import Iterator
from contextlib import closing

import pytest
import trio

from tunneld.net.liveness import (
    KEEPALIVE_PROBES,
    MAX_KEEPALIVE_SECONDS,
    PROBE_SECONDS,
    heard_ago,
    probe,
    set_keepalive,
)

TCP_ESTABLISHED = 1

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells when it has heard from a peer")


@pytest.fixture
def connection() -> Iterator[socket.socket]:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()),
        closing(listener.accept()[0]) as accepted,
    ):
        accepted.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        yield accepted


def options(connection: socket.socket) -> tuple[int, int, int]:
    """Seconds until the first probe, between two, and the number of probes."""
    numbers = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
    idle, interval, count = (connection.getsockopt(socket.IPPROTO_TCP, number) for number in numbers)
    return idle, interval, count


async def test_an_answer_to_a_probe_is_a_sign_of_life(connection: socket.socket) -> None:
    """The kernel probes once the connection has been silent for a second."""
    probe(connection)
    while (before := heard_ago(connection)) < PROBE_SECONDS / 2:  # noqa: ASYNC110 - the kernel tells by no event
        await trio.sleep(0.01)
    with trio.fail_after(10):
        while heard_ago(connection) >= before:  # noqa: ASYNC110 - the kernel tells by no event
            await trio.sleep(0.01)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(60.0, (60, 15, 4)), (10.0, (10, 2, 4)), (0.1, (1, 1, 4)), (1e9, (MAX_KEEPALIVE_SECONDS, 8191, 4))],
)
def test_probes_are_a_quarter_of_the_idle_time_apart(
    connection: socket.socket, seconds: float, expected: tuple[int, int, int]
) -> None:
    set_keepalive(connection, seconds)
    assert options(connection) == expected
    assert expected[2] == KEEPALIVE_PROBES


def test_a_failed_connection_has_not_been_heard_for_ever(connection: socket.socket) -> None:
    assert heard_ago(connection) < math.inf
    assert heard_ago(connection, {TCP_ESTABLISHED}) == math.inf


def test_a_closed_or_another_kind_of_socket_does_no_harm(connection: socket.socket) -> None:
    connection.close()
    one, other = socket.socketpair()
    with one, other:
        for each in (connection, one):
            set_keepalive(each, 10)
            probe(each)
            assert heard_ago(each) == 0.0
