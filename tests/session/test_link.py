"""The connection below a carrier tells how long its way is."""

from __future__ import annotations

import math
import socket

from tunneld.session.link import Link


def test_the_kernel_knows_the_round_trip_of_a_connection_that_has_carried_something() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    with near, far:
        near.sendall(b"?")
        assert far.recv(1) == b"?"
        far.sendall(b"!")
        assert near.recv(1) == b"!"
        assert 0 <= Link(near).round_trip() < 60


def test_where_nothing_is_known_of_it_no_round_trip_is_too_long() -> None:
    near, far = socket.socketpair()
    with near, far:
        assert Link(near).round_trip() == math.inf
