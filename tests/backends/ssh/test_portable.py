"""The path for versions of asyncssh whose internals are not known: with the public interface alone."""

from __future__ import annotations

import ast
import random
import sys
from pathlib import Path

import asyncssh
import pytest
import structlog
import trio

from tests.agent.support import echo, local_server
from tests.agent.test_expose import ask
from tests.backends.ssh.support import client, make_key, openssh, relay
from tests.support.credentials import credential
from tests.support.peers import PATIENCE, connect, is_dropped, read_exactly
from tests.support.programs import run
from tunneld.backends.ssh import portable
from tunneld.backends.ssh.paths import FORCED, choose_path, is_known

LOCAL = "127.0.0.1"
NOISE = random.Random(5).randbytes(3 << 20)


@pytest.fixture(autouse=True)
def _portable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FORCED, "1")


@pytest.mark.parametrize(
    ("version", "known"),
    [
        ("2.24.0", True),
        ("2.24.1", True),
        ("2.25.0", False),
        ("2.23.9", False),
        ("3.0.0", False),
        ("2", False),
        ("x", False),
    ],
)
def test_the_fast_path_is_for_known_versions(version: str, known: bool) -> None:
    assert is_known(version) is known


@pytest.mark.parametrize(
    ("version", "forced", "fast"), [("2.24.1", "", True), ("2.24.1", "1", False), ("2.25.0", "", False)]
)
def test_the_path_is_chosen_at_the_start_and_the_slow_one_is_logged(
    monkeypatch: pytest.MonkeyPatch, version: str, forced: str, fast: bool
) -> None:
    monkeypatch.setattr(asyncssh, "__version__", version)
    monkeypatch.setenv(FORCED, forced)
    with structlog.testing.capture_logs() as logged:
        assert choose_path().is_fast is fast
    assert [line["event"] for line in logged] == ([] if fast else ["ssh takes the slow path"])


def test_it_uses_public_names_of_asyncssh_only_and_none_of_the_fast_path() -> None:
    tree = ast.parse(Path(portable.__file__).read_text())
    private = [
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not (isinstance(node.value, ast.Name) and node.value.id == "self")
    ]
    assert private == []
    modules = {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    modules.discard("tunneld.backends.ssh.forwarded")  # which knows nothing of asyncssh
    assert not any(str(module).startswith(("asyncssh", "tunneld.backends.ssh")) for module in modules)


async def test_no_module_of_the_fast_path_is_imported() -> None:
    code = (
        "import sys; from tunneld.backends.ssh import port, paths; paths.choose_path();"
        "print(*(name for name in sys.modules if name.startswith('tunneld.backends.ssh.')))"
    )
    imported = await run([sys.executable, "-c", code])
    assert "portable" in imported
    assert not any(f".{name}" in imported for name in ("fast", "restricted", "negotiation", "gcm", "session_channel"))


async def test_a_tunnel_relays_and_ends_as_on_the_fast_path(tmp_path: Path) -> None:
    key, line = make_key(tmp_path)
    with trio.fail_after(2 * PATIENCE), structlog.testing.capture_logs() as logged:
        async with (
            relay([credential("me", authorized_keys=[line])]) as here,
            local_server(echo) as target,
            client(openssh(here, "-N", "-R", f"0:{LOCAL}:{target.port}", LOCAL, key=key)) as ssh,
        ):
            (tunnel,) = await here.until_served()
            assert tunnel.spec.owner == "me"
            assert await ask(tunnel.client_uri, NOISE) == NOISE
            async with trio.open_nursery() as nursery:
                for _ in range(20):
                    nursery.start_soon(ask, tunnel.client_uri, b"x" * 5000)
            visitor = await connect(tunnel.client_uri)
            await visitor.send_all(b"hello")
            assert await read_exactly(visitor, 5) == b"hello"
            tunnel.close("closed by the test")
            assert await is_dropped(visitor)
            await ssh.ended()
    assert [each for each in logged if each["log_level"] == "error"] == []


async def test_a_refused_key_and_a_closed_local_server() -> None:
    with trio.fail_after(PATIENCE), structlog.testing.capture_logs() as logged:
        async with relay([credential("me", authorized_keys=[])]) as here, client(openssh(here, LOCAL)) as ssh:
            assert await ssh.ended() == 255
            assert "Permission denied" in ssh.err
        async with relay() as here, client(openssh(here, "-N", "-R", f"0:{LOCAL}:1", LOCAL)):
            (tunnel,) = await here.until_served()
            assert await is_dropped(await connect(tunnel.client_uri))
            assert tunnel.parked
    assert [each for each in logged if each["log_level"] == "error"] == []


async def test_sessions_work() -> None:
    with trio.fail_after(PATIENCE):
        async with relay() as here, client(openssh(here, LOCAL, "list")) as ssh:
            assert await ssh.ended() == 0
            assert ssh.out == "no tunnel is open\n"


async def test_garbage_is_not_a_bug() -> None:
    with trio.fail_after(PATIENCE), structlog.testing.capture_logs() as logged:
        async with relay() as here:
            for data in (b"GET / HTTP/1.1\r\n\r\n", b"SSH-2.0-x\r\n" + b"\xff" * 100, b"SSH-2.0-x\r\n\0\0\0\x0c\4\x14"):
                stream = await trio.open_tcp_stream(LOCAL, here.port)
                async with stream:
                    await stream.send_all(data)
                    await stream.send_eof()
                    try:
                        async for _ in stream:
                            pass
                    except trio.BrokenResourceError:
                        pass
            await here.until(lambda: len(here.preauth) == 0)
    assert [each for each in logged if each["log_level"] == "error"] == []
