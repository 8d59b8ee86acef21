"""The environment that tells of inherited descriptors, and what systemd may give."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunneld.daemon.handover import Inherited, check_given
from tunneld.errors import ConfigError

ME = 4711


def listening(count: str, names: str, pid: int = ME) -> dict[str, str]:
    return {"LISTEN_PID": str(pid), "LISTEN_FDS": count, "LISTEN_FDNAMES": names}


def test_nothing_is_inherited_by_default() -> None:
    assert Inherited.parse({}, ME) == Inherited()


def test_names_belong_to_descriptors_in_order_and_kept_ones_are_told_apart() -> None:
    found = Inherited.parse(listening("3", "control:kept:webmux"), ME)
    assert found == Inherited(((3, "control"), (5, "webmux")), (4,), None)


def test_what_is_for_another_process_is_not_ours() -> None:
    assert Inherited.parse(listening("1", "control", pid=1) | {"TUNNELD_HANDOVER": "1:7"}, ME) == Inherited()


def test_the_letter_of_the_process_before_us() -> None:
    assert Inherited.parse({"TUNNELD_HANDOVER": f"{ME}:7"}, ME).letter == 7


@pytest.mark.parametrize(
    ("count", "names", "said"),
    [
        ("two", "a:b", "LISTEN_FDS is 'two', which is not a number"),
        ("-1", "", "LISTEN_FDS is '-1'"),
        ("2", "control", "LISTEN_FDNAMES names 1 descriptors, but LISTEN_FDS counts 2"),
    ],
)
def test_what_makes_no_sense_is_said(count: str, names: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Inherited.parse(listening(count, names), ME)


@given(st.dictionaries(st.sampled_from(["LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "TUNNELD_HANDOVER"]), st.text()))
def test_any_environment_parses_or_is_refused(environ: dict[str, str]) -> None:
    with suppress(ConfigError):
        Inherited.parse({**environ, "LISTEN_PID": str(ME)}, ME)


# Socket activation


def opened(make: Callable[[], socket.socket]) -> int:
    return make().detach()


def a_datagram_socket() -> socket.socket:
    made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    made.bind(("127.0.0.1", 0))
    return made


def a_unix_socket() -> socket.socket:
    made = socket.socket(socket.AF_UNIX)
    made.bind("")  # a name that the kernel makes up
    made.listen()
    return made


def test_listeners_go_to_the_faces_that_they_are_named_after() -> None:
    fds = [opened(lambda: socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
    found = check_given([(fds[0], "control"), (fds[1], "webmux"), (fds[2], "control")], ["control", "webmux"])
    assert {face: [one.fileno() for one in listeners] for face, listeners in found.items()} == {
        "control": [fds[0], fds[2]],
        "webmux": [fds[1]],
    }
    for listeners in found.values():
        for one in listeners:
            assert not one.getblocking()
            one.close()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (a_datagram_socket, "its unit needs ListenStream=, not ListenDatagram="),
        (a_unix_socket, "ListenStream= must be a port, or an address and a port"),
        (socket.socket, "is a connection, not a listener: its unit must not say Accept=yes"),
    ],
)
def test_the_wrong_kind_of_socket_is_a_sentence(make: Callable[[], socket.socket], said: str) -> None:
    with make() as wrong:
        with pytest.raises(ConfigError) as caught:
            check_given([(wrong.fileno(), "http")], ["http"])
        assert str(caught.value).startswith(f"systemd's socket {wrong.fileno()}, named 'http', is ")
        assert said in str(caught.value)


def test_what_is_no_socket_or_has_another_name_is_a_sentence_each(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    try:
        with pytest.raises(ConfigError) as caught:
            check_given([(fd, "http"), (fd, "tunneld.socket"), (99999, "http")], ["control", "http"])
    finally:
        os.close(fd)
    no_socket, another_name, no_descriptor = (problem.partition(", ")[2] for problem in caught.value.problems)
    assert no_socket == "named 'http', is no socket: its unit needs ListenStream="
    assert another_name.startswith("named 'tunneld.socket', is for no face that is enabled: FileDescriptorName= of its")
    assert no_descriptor == "named 'http', cannot be used: bad file descriptor"
