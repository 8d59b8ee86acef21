"""The secret of a connected agent is rotated."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from tests.agent.support import RecordingReporter, echo, exposed, local_server
from tests.agent.test_expose import address, ask
from tests.control.test_daemon_auth import HEAD, Running, running
from tests.support.credentials import SECRET, credential
from tests.support.peers import connect, read_exactly
from tunneld.agent import access, backoff, session
from tunneld.agent.access import RelayAccess
from tunneld.client import connect as connect_to
from tunneld.errors import RefusedError
from tunneld.wire.verifier import Verifier

ROOT = ("root", SECRET)


@pytest.fixture(autouse=True)
def _short_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long delays add nothing to what is tested here."""
    monkeypatch.setattr(backoff, "FIRST_DELAY", 0.01)
    monkeypatch.setattr(backoff, "MAX_DELAY", 0.02)
    monkeypatch.setattr(session, "REVIEW_INTERVAL", 0.01)
    monkeypatch.setattr(access, "SECRET_CHECK_INTERVAL", 0.01)


def with_secret(secret: str) -> str:
    """A configuration in which alice has this secret."""
    tables = []
    for one in (credential("alice", secret), credential("root", role="admin")):
        assert isinstance(one.proof, Verifier)
        tables.append(f'[[credential]]\nname = "{one.name}"\nrole = "{one.role}"\nverifier = "{one.proof.reveal()}"\n')
    return HEAD + "".join(tables)


@asynccontextmanager
async def rotated(relay: Running, secret: str) -> AsyncIterator[None]:
    """Give alice another secret at the relay, and reload it."""
    relay.path.write_text(with_secret(secret))
    async with connect_to(relay.control, credential=ROOT) as root:
        await root.call("reload")
        yield


async def test_an_agent_with_a_secret_file_waits_for_the_new_secret_and_its_visitors_go_on(tmp_path: Path) -> None:
    file, config, reporter = tmp_path / "secret", tmp_path / "tunnel.toml", RecordingReporter()
    config.write_text(with_secret(SECRET))
    file.write_text(SECRET)
    async with running(config) as relay, local_server(echo) as target:
        alice = RelayAccess(relay.control, credential=("alice", SECRET), reread_secret=file.read_text)
        async with exposed(target, alice, reporter):
            stream = await connect(address(reporter))
            await stream.send_all(b"before")
            assert await read_exactly(stream, 6) == b"before"
            async with rotated(relay, "another"):
                first, second = await reporter.wait_for("reconnecting"), await reporter.wait_for("reconnecting", 2)
                assert first["reason"] == "credential 'alice' was removed or its secret changed since you authenticated"
                assert str(second["reason"]).endswith(
                    "check the name and the secret; waiting for a new secret in its file"
                )
                await stream.send_all(b"after")
                assert await read_exactly(stream, 5) == b"after"
                file.write_text("another")
                await reporter.wait_for("resumed")
            assert await ask(address(reporter), b"new") == b"new"


async def test_an_agent_without_a_secret_file_ends_and_names_the_refused_credential(tmp_path: Path) -> None:
    config, reporter = tmp_path / "tunnel.toml", RecordingReporter()
    config.write_text(with_secret(SECRET))
    async with running(config) as relay, local_server(echo) as target:
        refused = pytest.RaisesExc(RefusedError, match=r"refused the credential 'alice': .*; check the name")
        with pytest.RaisesGroup(refused, flatten_subgroups=True):
            alice = RelayAccess(relay.control, credential=("alice", SECRET))
            async with exposed(target, alice, reporter), rotated(relay, "another"):
                await trio.sleep_forever()
