"""The relay's own EGTP node, over TCP: nodes of credentials pass messages along, with the modern and the classic
envelope; other nodes are refused.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from structlog.testing import capture_logs

from tests.agent.support import PATIENCE
from tests.egtp.test_service_task import RemoteNode
from tests.engine.bench import stream
from tests.wire.egtp.mesgen.keys import A, B
from tunneld.auth.authenticator import Authenticator
from tunneld.auth.handshakes import HandshakeSupervisor
from tunneld.backends.egtp_port import serve_nodes
from tunneld.backends.egtp_relay import CLASSIC_KEY_FILE, MAX_CONNECTIONS, NodeRelay, load_classic_key
from tunneld.config.credentials import make_verifier
from tunneld.config.schema import Settings
from tunneld.egtp.handshake import NodeConnection, begin_session
from tunneld.engine.engine import Engine
from tunneld.engine.pump import Pump
from tunneld.errors import ConfigError, RemoteProtocolError
from tunneld.net import sockets
from tunneld.net.listeners import ReloadableListener
from tunneld.net.node_id import NodeId
from tunneld.tls.identity import Identity
from tunneld.tunnel.keys import KeyRegistry
from tunneld.wire.egtp.messages import MojoRequest, MojoResponse, parse_message, response_to
from tunneld.wire.egtp.relaying import (
    ARE_THERE_MESSAGES,
    MESSAGE_FOR_YOU,
    PASS_THIS_ALONG,
    MailQuery,
    PassAlong,
    parse_mail,
    parse_outcome,
    success,
)

VERIFIER = make_verifier("not used here")
RELAY, ALICE, BOB, EVE = (Identity.from_seed(bytes([number]) * 32) for number in range(4))


class RunningRelay:
    """A relay with a port for nodes, and the credentials `home` (Alice, classic A) and `office` (Bob, classic B)."""

    def __init__(self, folder: Path, **egtp: Any) -> None:
        self.folder = folder
        self.settings = self.settings_with(egtp)
        self.port = 0

    def settings_with(self, egtp: dict[str, Any], **home: Any) -> Settings:
        nodes = {"home": [str(ALICE.id), str(NodeId(A.node_id))], "office": [str(BOB.id), str(NodeId(B.node_id))]}
        credentials = [{"name": name, "verifier": VERIFIER, "nodes": ids} for name, ids in nodes.items()]
        credentials[0].update(home)
        document = {"egtp": {"enabled": True, "identity": str(self.folder / "egtp_key"), **egtp}}
        return Settings.model_validate({**document, "credential": credentials})

    async def connect(self, identity: Identity) -> NodeConnection:
        """Connect as a node, and begin a session with the relay."""
        connection = self.socket()
        try:
            return await begin_session(connection, identity, RELAY.id)
        except BaseException:
            connection.close()
            raise

    def socket(self) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port))
        connection.setblocking(False)
        return connection


@asynccontextmanager
async def running(engine: Engine, folder: Path, **egtp: Any) -> AsyncIterator[RunningRelay]:
    relay = RunningRelay(folder, **egtp)
    assert isinstance(engine, Pump)
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            handshakes = HandshakeSupervisor(Authenticator(lambda: ()), lambda: None, lambda: PATIENCE)
            await nursery.start(handshakes.run)
            listener = ReloadableListener("egtp", sockets.bind_tcp("127.0.0.1", 0))
            node = NodeRelay(lambda: relay.settings, lambda: RELAY)
            await nursery.start(
                serve_nodes, listener, lambda: relay.settings.egtp, handshakes, KeyRegistry(), engine, node
            )
            assert listener.port is not None
            relay.port = listener.port
            yield relay
            nursery.cancel_scope.cancel()


async def ask(node: NodeConnection, kind: bytes, body: PassAlong | MailQuery) -> Any:
    """The body of the response."""
    await node.send(MojoRequest(kind, RELAY.id.digest, os.urandom(20), body.encode()).encode())
    response = parse_message(await node.receive())
    assert isinstance(response, MojoResponse)
    return response.body


def close(*nodes: NodeConnection) -> None:
    for node in nodes:
        node.connection.close()


async def test_a_message_is_passed_along_and_acknowledged(engine: Engine, tmp_path: Path) -> None:
    async with running(engine, tmp_path) as relay:
        alice, bob = await relay.connect(ALICE), await relay.connect(BOB)
        assert parse_mail(await ask(bob, ARE_THERE_MESSAGES, MailQuery())).messages == ()
        assert parse_outcome(await ask(alice, PASS_THIS_ALONG, PassAlong(BOB.id.digest, b"opaque"))) is None
        message = parse_message(await bob.receive())
        assert isinstance(message, MojoRequest)
        assert (message.kind, message.body) == (MESSAGE_FOR_YOU, b"opaque")
        await bob.send(response_to(message, message.nonce, success()).encode())
        assert parse_mail(await ask(bob, ARE_THERE_MESSAGES, MailQuery())).messages == ()
        close(alice, bob)


async def test_a_message_waits_for_a_node_that_is_not_connected(engine: Engine, tmp_path: Path) -> None:
    async with running(engine, tmp_path) as relay:
        alice = await relay.connect(ALICE)
        await ask(alice, PASS_THIS_ALONG, PassAlong(BOB.id.digest, b"opaque"))
        bob = await relay.connect(BOB)
        assert parse_mail(await ask(bob, ARE_THERE_MESSAGES, MailQuery(fast_relay=False))).messages == (b"opaque",)
        reason = parse_outcome(await ask(alice, PASS_THIS_ALONG, PassAlong(RELAY.id.digest, b"x")))
        assert reason == "a relay passes no messages to itself"
        close(alice, bob)


async def test_an_unknown_node_is_refused(engine: Engine, tmp_path: Path) -> None:
    with capture_logs() as logs:
        async with running(engine, tmp_path) as relay:
            eve = await relay.connect(EVE)
            with pytest.raises(RemoteProtocolError):
                await eve.receive()
            close(eve)
    assert f"node {EVE.id} may not use this relay" in [entry.get("reason") for entry in logs]


async def test_a_credential_may_be_limited_to_networks(engine: Engine, tmp_path: Path) -> None:
    async with running(engine, tmp_path) as relay:
        relay.settings = relay.settings_with({}, networks=["192.0.2.0/24"])
        alice, bob = await relay.connect(ALICE), await relay.connect(BOB)
        with pytest.raises(RemoteProtocolError):
            await alice.receive()
        await ask(bob, ARE_THERE_MESSAGES, MailQuery())
        close(alice, bob)


async def test_the_oldest_of_many_connections_of_a_node_is_closed(engine: Engine, tmp_path: Path) -> None:
    async with running(engine, tmp_path) as relay:
        nodes = [await relay.connect(ALICE) for _ in range(MAX_CONNECTIONS + 1)]
        with pytest.raises(RemoteProtocolError):
            await nodes[0].receive()
        for node in nodes[1:]:
            await ask(node, ARE_THERE_MESSAGES, MailQuery(fast_relay=False))
        close(*nodes)


async def test_limits_follow_the_configuration(engine: Engine, tmp_path: Path) -> None:
    async with running(engine, tmp_path, mail_messages=1, mail_rate="3/h") as relay:
        alice = await relay.connect(ALICE)
        reasons = [
            parse_outcome(await ask(alice, PASS_THIS_ALONG, PassAlong(BOB.id.digest, bytes(n)))) for n in range(4)
        ]
        assert reasons[0] is None
        assert str(reasons[1]).startswith("credential 'home' limit reached: 1 of 1 messages wait")
        assert str(reasons[3]).startswith("rate limit reached")
        relay.settings = relay.settings_with({"mail_messages": 2})
        assert parse_outcome(await ask(alice, PASS_THIS_ALONG, PassAlong(BOB.id.digest, b"xxxxx"))) is None
        close(alice)


async def test_a_node_that_is_removed_from_the_configuration_is_refused(engine: Engine, tmp_path: Path) -> None:
    async with running(engine, tmp_path) as relay:
        alice = await relay.connect(ALICE)
        await ask(alice, ARE_THERE_MESSAGES, MailQuery())
        relay.settings = relay.settings_with({}, nodes=[])
        await alice.send(MojoRequest(ARE_THERE_MESSAGES, RELAY.id.digest, bytes(20), MailQuery().encode()).encode())
        with pytest.raises(RemoteProtocolError):
            await alice.receive()
        close(alice)


# Classic envelopes


async def classic_node(relay: RunningRelay, key: Any) -> RemoteNode:
    relay_key = load_classic_key(relay.folder / CLASSIC_KEY_FILE)
    return RemoteNode(stream(relay.socket()), key, relay_key.public)


async def test_classic_nodes_use_the_same_port_and_the_same_mailboxes(engine: Engine, tmp_path: Path) -> None:
    async with running(engine, tmp_path, classic=True) as relay:
        a, bob = await classic_node(relay, A), await relay.connect(BOB)
        await ask(bob, ARE_THERE_MESSAGES, MailQuery())
        response = await a.ask(PASS_THIS_ALONG, PassAlong(BOB.id.digest, b"from a classic node"))
        assert response.body == success()
        message = parse_message(await bob.receive())
        assert isinstance(message, MojoRequest)
        assert message.body == b"from a classic node"
        await ask(bob, PASS_THIS_ALONG, PassAlong(A.node_id, b"to a classic node"))
        response = await a.ask(ARE_THERE_MESSAGES, MailQuery())
        assert response.body == [b"to a classic node"]
        a.far.socket.close()
        close(bob)


async def test_classic_envelopes_are_off_unless_turned_on(engine: Engine, tmp_path: Path) -> None:
    with capture_logs() as logs:
        async with running(engine, tmp_path) as relay:
            a = await classic_node(relay, A)
            with pytest.raises((AssertionError, trio.BrokenResourceError)):
                await a.ask(ARE_THERE_MESSAGES, MailQuery())
            a.far.socket.close()
    assert "hidden server refused" in [entry["event"] for entry in logs]


async def test_an_unknown_classic_node_is_refused(engine: Engine, tmp_path: Path) -> None:
    async with running(engine, tmp_path, classic=True) as relay:
        relay.settings = relay.settings_with({"classic": True}, nodes=[str(ALICE.id)])
        a, b = await classic_node(relay, A), await classic_node(relay, B)
        with pytest.raises((AssertionError, trio.BrokenResourceError)):
            await a.ask(ARE_THERE_MESSAGES, MailQuery())
        await b.ask(ARE_THERE_MESSAGES, MailQuery())
        for node in (a, b):
            node.far.socket.close()


def test_nothing_of_the_classic_envelope_is_loaded_before_it_is_used() -> None:
    code = "import sys, tunneld.backends.egtp_port; print(sorted(name for name in sys.modules if 'mesgen' in name))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[]\n"


def test_the_classic_key_is_made_once_and_private(tmp_path: Path) -> None:
    path = tmp_path / "folder" / CLASSIC_KEY_FILE
    made = load_classic_key(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert load_classic_key(path).node_id == made.node_id
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        load_classic_key(path)
