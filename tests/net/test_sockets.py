"""Listening sockets, free ports and the limit of descriptors."""

from __future__ import annotations

import errno
import os
import random
import re
import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager

import pytest

from tests.support.system import has_ipv6, need_ipv6
from tunneld.errors import SHORTAGES, LimitReachedError, ListenError, ShortageError
from tunneld.net import sockets

LOOPBACK = "127.0.0.1"


@contextmanager
def listening(host: str = LOOPBACK, port: int = 0) -> Iterator[list[socket.socket]]:
    listeners = sockets.bind_tcp(host, port)
    try:
        yield listeners
    finally:
        for listener in listeners:
            listener.close()


@contextmanager
def connected() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A non-blocking connection that one of our listeners accepted, and the client socket."""
    with listening() as (listener,), socket.create_connection(listener.getsockname()) as peer:
        listener.setblocking(True)
        accepted, _ = listener.accept()
        with accepted:
            accepted.setblocking(False)
            yield accepted, peer


def port_of(listener: socket.socket) -> int:
    return int(listener.getsockname()[1])


def test_a_listener_is_non_blocking_and_accepted_connections_have_keep_alive() -> None:
    with listening() as (listener,):
        assert listener.getblocking() is False
        assert listener.get_inheritable() is False
    with connected() as (accepted, _):
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 60


def test_keep_alive_times_are_clamped_to_what_the_system_accepts() -> None:
    for asked, got in ((0.2, 1), (90.0, 90), (1e6, 32767)):
        (listener,) = sockets.bind_tcp(LOOPBACK, 0, keepalive=asked)
        with listener:
            assert listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == got


@pytest.mark.parametrize("host", ["", "::"])
def test_the_wildcard_accepts_ipv4_and_ipv6(host: str) -> None:
    with listening(host) as (listener,):
        socket.create_connection((LOOPBACK, port_of(listener))).close()
        if has_ipv6():
            socket.create_connection(("::1", port_of(listener))).close()


def test_without_ipv6_the_wildcard_is_ipv4(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: False)
    with listening("") as (listener,):
        assert listener.getsockname()[0] == "0.0.0.0"


def two_addresses(*_: object, **__: object) -> list[tuple[object, ...]]:
    return [(socket.AF_INET, 0, 0, "", (LOOPBACK, 0)), (socket.AF_INET6, 0, 0, "", ("::1", 0, 0, 0))]


def test_all_addresses_of_a_name_get_the_same_port(monkeypatch: pytest.MonkeyPatch) -> None:
    need_ipv6()
    monkeypatch.setattr(socket, "getaddrinfo", two_addresses)
    with listening("localhost") as listeners:
        assert [listener.family for listener in listeners] == [socket.AF_INET, socket.AF_INET6]
        assert len({port_of(listener) for listener in listeners}) == 1


def test_an_address_that_the_machine_lacks_is_skipped_if_another_works(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = (socket.AF_INET, 0, 0, "", ("203.0.113.1", 0))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [lacking, two_addresses()[0]])
    with listening("some.name") as (listener,):
        assert listener.getsockname()[0] == LOOPBACK


def test_a_port_that_is_taken_on_one_address_leaves_no_listener(monkeypatch: pytest.MonkeyPatch) -> None:
    need_ipv6()
    with listening("::1") as (taken,):
        monkeypatch.setattr(socket, "getaddrinfo", two_addresses)
        before = sockets.open_descriptors()
        with pytest.raises(ListenError, match="address already in use"):
            sockets.bind_tcp("localhost", port_of(taken))
        assert sockets.open_descriptors() == before


@pytest.mark.parametrize(
    ("host", "place", "reason"),
    [
        (LOOPBACK, f"tcp://{LOOPBACK}", "address already in use"),
        ("", "tcp://*", "address already in use"),
        ("203.0.113.1", "tcp://203.0.113.1", "cannot assign requested address"),
        ("2001:db8::1", "tcp://[2001:db8::1]", ""),
    ],
)
def test_a_failure_names_the_address_and_the_reason(host: str, place: str, reason: str) -> None:
    with listening(LOOPBACK) as (taken,):
        port = port_of(taken)
        with pytest.raises(ListenError) as failed:
            sockets.bind_tcp(host, port)
    assert str(failed.value).startswith(f"could not listen on {place}:{port}: {reason}")


@pytest.mark.parametrize("code", sorted(SHORTAGES))
def test_each_shortage_error_raises_shortage_error(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def fail(*_: object) -> socket.socket:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(socket, "socket", fail)
    with pytest.raises(ShortageError, match=r"could not listen on tcp://127.0.0.1:0: "):
        sockets.bind_tcp(LOOPBACK, 0)
    with pytest.raises(ShortageError):
        sockets.bind_in_range(LOOPBACK, range(1))


def test_a_real_lack_of_descriptors_raises_shortage_error() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    os.close(lowest_free := os.dup(0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        with pytest.raises(ShortageError, match="too many open files"):
            sockets.bind_tcp(LOOPBACK, 0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_privileged_port_names_the_required_capability() -> None:
    error = sockets._listen_error("", "443", OSError(errno.EACCES, "Permission denied"))
    assert re.fullmatch(r"could not listen on tcp://\*:443: permission denied: ports below .*_SERVICE .*", str(error))


@contextmanager
def neighbours(count: int) -> Iterator[tuple[range, list[socket.socket]]]:
    """`count` listeners on consecutive ports, below the ports that the system assigns to connections."""
    with ExitStack() as held:
        for _ in range(100):
            first = random.randrange(10_000, 30_000)
            ports = range(first, first + count)
            try:
                listeners = [held.enter_context(listening(port=port))[0] for port in ports]
            except ListenError:
                held.close()
                continue
            yield ports, listeners
            return
    pytest.skip("no free neighbouring ports")


def test_the_only_free_port_of_a_range_is_found_from_any_start() -> None:
    with neighbours(8) as (ports, held):
        held[3].close()
        for start in range(8):
            with closing(sockets.bind_in_range(LOOPBACK, ports, order=sockets.UpwardsFrom(start))) as listener:
                assert port_of(listener) == ports[3]


def test_the_search_starts_at_a_random_port() -> None:
    with neighbours(8) as (ports, held):
        for listener in held:
            listener.close()
        found: set[int] = set()
        for _ in range(200):  # missing one of eight by chance: once in 10^10 runs
            with closing(sockets.bind_in_range(LOOPBACK, ports)) as listener:
                found.add(port_of(listener))
        assert found == set(ports)


def test_a_full_range_raises_limit_reached_and_leaves_no_descriptor() -> None:
    with neighbours(3) as (ports, _):
        before = sockets.open_descriptors()
        with pytest.raises(LimitReachedError, match=rf"no port is free in {ports[0]}-{ports[-1]} on 127.0.0.1"):
            sockets.bind_in_range(LOOPBACK, ports)
        assert sockets.open_descriptors() == before


def test_a_range_on_an_address_that_the_machine_lacks_fails_at_once() -> None:
    with pytest.raises(ListenError, match=r"tcp://203.0.113.1:20000-29999: cannot assign"):
        sockets.bind_in_range("203.0.113.1", range(20000, 30000))


def test_a_port_chosen_by_the_system_that_may_not_be_used_is_left_alone() -> None:
    seen: list[int] = []

    class NotTheFirstThree(sockets.UpwardsFrom):
        def accepts(self, port: int) -> bool:
            seen.append(port)
            return len(seen) > 3

    before = sockets.open_descriptors()
    with closing(sockets.bind_in_range(LOOPBACK, range(1), order=NotTheFirstThree())) as listener:
        assert port_of(listener) == seen[3]
        assert seen[3] not in seen[:3]
        assert sockets.open_descriptors() == before + 1


def test_a_listener_can_be_shared_with_the_one_that_it_will_replace() -> None:
    """The port has a listener all the time, and a connection made before the old one closes is accepted by the new."""
    with closing(sockets.bind_port(LOOPBACK, 0)) as old:
        port = port_of(old)
        with pytest.raises(LimitReachedError):
            sockets.bind_port(LOOPBACK, port)
        with closing(sockets.bind_port(LOOPBACK, port, held=[old])) as new:
            visitor = socket.create_connection((LOOPBACK, port))
            old.close()
            accepted, _ = new.accept()
            accepted.close()
            visitor.close()


def test_a_listener_on_another_address_is_bound_over_the_one_that_it_will_replace() -> None:
    with closing(sockets.bind_port("0.0.0.0", 0)) as old:
        with closing(sockets.bind_port(LOOPBACK, port_of(old), held=[old])) as new:
            assert new.getsockname() == (LOOPBACK, port_of(old))
        with pytest.raises(LimitReachedError):
            sockets.bind_port(LOOPBACK, port_of(old))


def test_the_range_zero_is_any_port() -> None:
    with closing(sockets.bind_in_range(LOOPBACK, range(1))) as listener:
        assert port_of(listener) > 0


def test_listeners_are_described_as_uris() -> None:
    with listening() as (listener,):
        assert sockets.describe([listener, listener], "tls") == " ".join([f"tls://127.0.0.1:{port_of(listener)}"] * 2)


def test_the_descriptor_limit_is_raised_to_the_hard_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, hard // 2), hard))
    try:
        assert sockets.raise_descriptor_limit() == hard
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == hard
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(("limit", "for_tunnels"), [(8, 6), (256, 192), (1024, 960), (262_144, 262_080)])
def test_some_descriptors_are_reserved(limit: int, for_tunnels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    assert sockets.descriptors_for_tunnels() == for_tunnels


def test_without_a_limit_no_descriptors_are_reserved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert sockets.descriptors_for_tunnels() > 1 << 20


def test_the_limit_stays_if_the_system_refuses_to_raise_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise ValueError(errno.EINVAL)

    monkeypatch.setattr(resource, "setrlimit", refuse)
    assert sockets.raise_descriptor_limit() == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
