"""The rules for accept(2) that all accept loops share."""

from __future__ import annotations

import errno
import socket
from pathlib import Path

import pytest
import trio

import tunneld
from tests.support.system import has_ipv6
from tunneld.errors import SHORTAGES
from tunneld.net.accept import (
    CONNECTION_LOST,
    NOT_LISTENING,
    AcceptShortage,
    local_address,
    peer_address,
    unmap_address,
)
from tunneld.net.listeners import ReloadableListener
from tunneld.net.sockets import bind_tcp


def test_a_spell_of_failures_is_reported_once() -> None:
    reported: list[OSError] = []
    shortage = AcceptShortage(reported.append)
    first, second = OSError(errno.EMFILE, "first spell"), OSError(errno.EMFILE, "second spell")
    active = []
    for _ in range(3):
        shortage.begin(first)
    active.append(shortage.active)
    shortage.end()
    active.append(shortage.active)
    shortage.begin(second)
    assert active == [True, False]
    assert reported == [first, second]


def test_no_error_is_in_two_groups() -> None:
    assert len(SHORTAGES | NOT_LISTENING | CONNECTION_LOST) == len(SHORTAGES) + len(NOT_LISTENING) + len(
        CONNECTION_LOST
    )


@pytest.mark.parametrize(
    ("reported", "address"),
    [
        (("::ffff:192.0.2.9", 5, 0, 0), ("192.0.2.9", 5)),
        (("192.0.2.9", 5), ("192.0.2.9", 5)),
        (("2001:db8::1", 5, 0, 0), ("2001:db8::1", 5, 0, 0)),
        (("::ffff:0:0", 5, 0, 0), ("::ffff:0:0", 5, 0, 0)),
        (("fe80::1%eth0", 5, 0, 2), ("fe80::1%eth0", 5, 0, 2)),
        ("", ""),  # a Unix socket
    ],
)
def test_an_ipv4_mapped_address_is_the_ipv4_address(reported: object, address: object) -> None:
    assert unmap_address(reported) == address


@pytest.mark.skipif(not has_ipv6(), reason="no dual-stack sockets")
async def test_an_ipv4_peer_of_a_dual_stack_listener_has_ipv4_addresses() -> None:
    sender, receiver = trio.open_memory_channel[tuple[socket.socket, object]](1)
    listener = ReloadableListener("test", bind_tcp("", 0))
    async with trio.open_nursery() as nursery:
        await nursery.start(listener.serve, lambda *accepted: sender.send_nowait(accepted))
        with socket.create_connection(("127.0.0.1", listener.port)) as client:
            connection, address = await receiver.receive()
            with connection:
                assert address == peer_address(connection) == client.getsockname()
                assert local_address(connection) == client.getpeername()
        nursery.cancel_scope.cancel()


def test_no_other_module_asks_a_connection_for_its_peer() -> None:
    package = Path(tunneld.__file__).parent
    asking = {str(path.relative_to(package)) for path in package.rglob("*.py") if ".getpeername()" in path.read_text()}
    assert asking == {"net/accept.py", "engine/stream_end.py"}  # the engine asks whether a socket is connected
