"""sd_notify with a real datagram socket, on a path and under an abstract name."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as limits
from hypothesis import strategies as st

from tests.support.shortage import no_descriptors_left
from tunneld import systemd


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The socket of $NOTIFY_SOCKET, at systemd's end."""
    if request.param == "abstract" and sys.platform != "linux":
        pytest.skip("abstract names exist on Linux only")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        end.settimeout(10)
        end.bind(str(tmp_path / "notify") if request.param == "path" else "")
        name = end.getsockname()
        monkeypatch.setenv("NOTIFY_SOCKET", name if isinstance(name, str) else "@" + name[1:].decode())
        if not name:
            pytest.fail("no name")
        yield end


def test_ready_stopping_and_status_are_sent(manager: socket.socket) -> None:
    assert systemd.ready()
    assert systemd.stopping("draining, 3 visitors")
    assert systemd.status("2 tunnels")
    assert [manager.recv(4096) for _ in range(3)] == [
        b"READY=1",
        b"STOPPING=1\nSTATUS=draining, 3 visitors",
        b"STATUS=2 tunnels",
    ]


def test_a_reload_reports_its_beginning_and_its_end_even_if_it_fails(manager: socket.socket) -> None:
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    with pytest.raises(ValueError, match="bad file"), systemd.reloading():
        raise ValueError("bad file")
    began = dict(line.split("=") for line in manager.recv(4096).decode().splitlines())
    assert began["RELOADING"] == "1"
    assert before <= int(began["MONOTONIC_USEC"]) <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    assert manager.recv(4096) == b"READY=1"


@limits(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(min_size=1))
def test_a_status_cannot_contain_another_field(manager: socket.socket, text: str) -> None:
    assert systemd.status(text)
    assert len(manager.recv(65536).splitlines()) == 1


@pytest.mark.parametrize("address", [None, "", "vsock:2:1", "/nowhere/at/all", "@nobody listens here", "relative"])
def test_without_systemd_nothing_happens(monkeypatch: pytest.MonkeyPatch, address: str | None) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    if address is not None:
        monkeypatch.setenv("NOTIFY_SOCKET", address)
    assert systemd.is_available() == bool(address)
    assert not systemd.ready()
    with systemd.reloading():
        pass


def test_the_watchdog_interval_is_read_only_if_it_is_for_this_process(
    manager: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    for usec, pid, interval in (
        ("30000000", str(os.getpid()), 30.0),
        ("500000", None, 0.5),
        ("30000000", "1", None),
        ("0", None, None),
        ("soon", None, None),
        (None, None, None),
    ):
        for name, value in (("WATCHDOG_USEC", usec), ("WATCHDOG_PID", pid)):
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)
        assert systemd.watchdog_interval() == interval
    assert systemd.alive()
    assert systemd.alive("2 tunnels")
    assert [manager.recv(100), manager.recv(100)] == [b"WATCHDOG=1", b"WATCHDOG=1\nSTATUS=2 tunnels"]


@pytest.mark.skipif(sys.platform != "linux", reason="systemd exists on Linux only")
def test_without_free_descriptors_nothing_is_stored_or_raised(manager: socket.socket) -> None:
    from tunneld.daemon.handover import FdBundle, store  # noqa: PLC0415  # Linux only

    bundle, (near, far) = FdBundle(), socket.socketpair()
    bundle.put(near)
    with far, no_descriptors_left():
        assert not systemd.barrier()
        assert not store(b"manifest", bundle)
        assert near.fileno() == -1
