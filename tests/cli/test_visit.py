"""The arguments of `tunnel visit`, and standard input and output."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from tests.support.private import ALICE, BOB, SHELL, make_home
from tunneld.cli.tunnel import parser
from tunneld.cli.visit import FileStream, what_to_visit
from tunneld.errors import UsageError
from tunneld.tls.one_time import OneTimeCode

CODE = OneTimeCode.parse("K7QF-2M9D-X03A-TT4R-8WNH")


@pytest.fixture(autouse=True)
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return make_home(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("words", "where"),
    [
        (["shell@alice"], ("127.0.0.1", 0)),
        (["shell@alice", "2222"], ("127.0.0.1", 2222)),
        (["shell@alice", "0"], ("127.0.0.1", 0)),
        ([f"shell@{ALICE.id}", "[::1]:2222"], ("::1", 2222)),
        (["-W", "shell@alice"], ("127.0.0.1", 0)),
    ],
)
def test_a_tunnel_and_a_port(words: list[str], where: tuple[str, int], keys: Path) -> None:
    tunnel, found = what_to_visit(parser().parse_args(["visit", "--identity", str(keys / "bob"), *words]))
    assert found == where
    assert (tunnel.asked_for, tunnel.host, tunnel.identity, tunnel.name) == (str(SHELL), ALICE.id, BOB, "shell")


@pytest.mark.parametrize("words", [["--once", str(CODE)], ["--once", "-"], ["--once", str(CODE).lower(), "2222"]])
def test_a_code_needs_no_key(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f" {CODE} \n"))
    tunnel, _where = what_to_visit(parser().parse_args(["visit", *words]))
    assert (tunnel.asked_for, tunnel.host, tunnel.identity, tunnel.name) == (
        CODE.ticket, CODE.host.id, CODE.visitor, "",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "which tunnel"),
        (["shell"], "whose tunnel"),
        (["shell@dave"], "tunnel trust add dave ID"),
        (["shell@alice", "2222", "3333"], "unexpected argument '3333'"),
        (["-W", "shell@alice", "2222"], "unexpected argument '2222'"),
        (["shell@alice", "port"], "invalid address"),
        (["--once", "guess"], "not a code"),
        (["--once", str(CODE), "2222", "3333"], "unexpected argument"),
    ],
)
def test_mistakes(words: list[str], reason: str, keys: Path) -> None:
    with pytest.raises(UsageError, match=reason):
        what_to_visit(parser().parse_args(["visit", "--identity", str(keys / "bob"), *words]))


@pytest.fixture
def descriptor(tmp_path: Path) -> Iterator[int]:
    opened = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield opened
    os.close(opened)


async def test_a_file_is_read_and_written(descriptor: int) -> None:
    stream = FileStream(descriptor)
    await stream.send_all(b"content")
    os.lseek(descriptor, 0, os.SEEK_SET)
    assert await stream.receive_some() == b"content"
    assert await stream.receive_some() == b""
    await stream.wait_send_all_might_not_block()
    await stream.aclose()


async def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path / "file", os.O_RDONLY | os.O_CREAT)
    with pytest.raises(trio.BrokenResourceError):
        await FileStream(descriptor).send_all(b"content")
    os.close(descriptor)
