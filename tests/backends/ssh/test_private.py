"""A private tunnel whose host is behind a stock ssh client: the relay has no port for it, and passes bytes on."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import trio

from tests.agent.support import RecordingReporter
from tests.agent.test_private import HEADER, Streams, handshake
from tests.backends.ssh.support import client, openssh, relay
from tests.engine.bench import stream, tcp_pair
from tests.support.peers import PATIENCE
from tests.support.private import ALICE, BOB, SHELL, make_home
from tunneld.agent.config import PrivateSettings
from tunneld.agent.private import PrivateVisitors
from tunneld.agent.source import SocketVisitor, VisitorConnection
from tunneld.engine import new_engine
from tunneld.engine.engine import Engine
from tunneld.policy.private import PrivateClaim, claimed_text
from tunneld.tunnel.visitor import Visitor

LOCAL = "127.0.0.1"


async def test_a_visit_through_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nursery: trio.Nursery) -> None:
    make_home(tmp_path, monkeypatch)
    ALICE.save(tmp_path / "config/tunneld/identity.pem")
    engine, admitted = new_engine(), list[VisitorConnection]()
    await nursery.start(engine.run)
    with socket.create_server((LOCAL, 0)) as listener:
        listener.setblocking(False)
        await _visit(engine, listener, admitted)
    nursery.cancel_scope.cancel()


async def _visit(engine: Engine, listener: socket.socket, admitted: list[VisitorConnection]) -> None:
    host = PrivateVisitors(
        engine, PrivateSettings("shell", ("bob",)), RecordingReporter(), lambda one, _: admitted.append(one), _fail
    )
    engine.listen(listener, lambda connection, _peer: host.take(SocketVisitor(connection), HEADER), _fail_bug)
    claim = PrivateClaim(ALICE.public_key(), ALICE.sign(claimed_text("", "shell")))
    with trio.fail_after(PATIENCE):
        async with relay() as here:
            tunnel = await here.open(name="shell", private=str(claim))
            remote = f"0:{LOCAL}:{listener.getsockname()[1]}"
            async with client(openssh(here, "-N", "-R", remote, LOCAL, user=tunnel.server_uri.key)):
                await here.until_served()
                door = here.service.privates.find(SHELL)
                assert door is not None
                far, near = tcp_pair()
                door.take(Visitor(near, near.getpeername()))
                async with await handshake(stream(far), BOB) as session:
                    visitor = Streams(session)
                    one = await visitor.open()
                    await here.until(lambda: bool(admitted))
                    async with admitted[0].stream() as server:
                        visitor.mux.send(one, b"hello")
                        await visitor.flush()
                        assert await server.receive_some() == b"hello"
                        await server.send_all(b"answer")
                        await visitor.until(lambda: visitor.has(one, b"answer"))


def _fail(_header: bytes, reason: str) -> None:
    raise AssertionError(reason)


def _fail_bug(error: Exception) -> None:
    raise error
