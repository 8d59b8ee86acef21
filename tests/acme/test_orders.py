"""The manager with a real authority (Pebble): renewals within seconds, interruptions, hooks that fail."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
from structlog.testing import capture_logs

from tests.support.authority import Authority, http_server, running_authority, tls_server
from tunneld.acme.manager import CertificateManager
from tunneld.acme.state import account_folder, certificate_folder
from tunneld.config.certificates import AcmeSettings
from tunneld.errors import CertificateError, UsageError
from tunneld.tls.store import CertificateStore

PATIENCE = 60.0
VALIDITY = 8
"""Seconds: a certificate is renewed after four."""


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Authority]:
    with running_authority(tmp_path_factory.mktemp("pebble"), validity=VALIDITY) as running:
        yield running


class Relay:
    """A manager with its store, in the folder of one relay."""

    def __init__(self, authority: Authority, state: Path, **settings: Any) -> None:
        self.settings = AcmeSettings(
            enabled=True, agree=True, directory=authority.directory, ca_file=authority.ca_file, retry=1.0, **settings
        )
        self.store = CertificateStore(certificate_folder(state))
        self.store.apply(self.store.load({}))
        self.challenges: tuple[str, ...] = ("tls-alpn-01", "http-01")
        self.failed: list[str] = []
        self.manager = CertificateManager(
            self.store, lambda: self.settings, state, domain=lambda: "t.example.org", challenges=lambda: self.challenges
        )
        self.manager.on_failed = lambda _, reason: self.failed.append(reason)

    async def wait(self, condition: Callable[[], object]) -> None:
        with trio.fail_after(PATIENCE):
            while not condition():  # noqa: ASYNC110 - threads and processes tell by no event
                await trio.sleep(0.05)

    def expiry(self, name: str) -> float:
        found = self.store.certificate_for(name)
        return found.not_after or 0.0 if found is not None else 0.0


async def test_http_01_and_renewal_within_seconds(authority: Authority, tmp_path: Path, nursery: trio.Nursery) -> None:
    relay = Relay(authority, tmp_path)
    relay.challenges = ("http-01",)
    await nursery.start(relay.manager.run)
    with http_server(authority.http_port, relay.manager._answers):
        relay.manager.want("a.example.org", "alice")
        await relay.wait(lambda: relay.expiry("a.example.org"))
        first = relay.expiry("a.example.org")
        await relay.wait(lambda: relay.expiry("a.example.org") > first)
    assert relay.failed == []
    assert relay.manager.http_answer("unknown") is None
    nursery.cancel_scope.cancel()


async def test_tls_alpn_01(authority: Authority, tmp_path: Path, nursery: trio.Nursery) -> None:
    relay = Relay(authority, tmp_path)
    await nursery.start(relay.manager.run)

    def choose(name: str) -> Any:
        return relay.manager.tls_context(name)

    with tls_server(authority.tls_port, choose):
        relay.manager.want("b.example.org", "alice")
        await relay.wait(lambda: relay.expiry("b.example.org"))
    assert relay.manager.tls_context("b.example.org") is None
    nursery.cancel_scope.cancel()


async def test_the_next_challenge_is_tried_after_a_failure(
    authority: Authority, tmp_path: Path, nursery: trio.Nursery
) -> None:
    relay = Relay(authority, tmp_path)
    await nursery.start(relay.manager.run)
    with http_server(authority.http_port, relay.manager._answers):  # nothing answers tls-alpn-01
        relay.manager.want("c.example.org", "alice")
        await relay.wait(lambda: relay.expiry("c.example.org"))
    assert len(relay.failed) == 1
    assert "(tls-alpn-01)" in relay.failed[0]
    nursery.cancel_scope.cancel()


async def test_the_wildcard_by_a_hook(authority: Authority, tmp_path: Path, nursery: trio.Nursery) -> None:
    relay = Relay(authority, tmp_path, dns_hook=authority.hook)
    await nursery.start(relay.manager.run)
    relay.manager.want("d.t.example.org", "alice")
    await relay.wait(lambda: relay.expiry("d.t.example.org"))
    assert [list(each.names) for each in relay.store.stored()] == [["*.t.example.org"]]
    steps: list[str] = []
    await relay.manager.trial("*.t.example.org", steps.append)
    assert steps == [
        f"the account at {authority.directory} is usable",
        "the authority accepted the order",
        *[step for step in steps if "dns-01" in step],  # none if the authority remembers the last validation
        "the authority has validated all names",
        "the authority issued a certificate, which is thrown away",
    ]
    before = relay.expiry("d.t.example.org")
    await trio.sleep(1.1)  # dates have seconds
    await relay.manager.renew("*.t.example.org")
    assert relay.expiry("d.t.example.org") > before
    relay.challenges = ()
    relay.settings = relay.settings.model_copy(update={"dns_hook": ()})
    with pytest.raises(CertificateError, match=r"this relay answers none"):
        await relay.manager.trial("e.example.org", steps.append)
    nursery.cancel_scope.cancel()


async def test_a_hook_that_hangs_is_killed_with_its_children(
    authority: Authority, tmp_path: Path, nursery: trio.Nursery
) -> None:
    hook, pids = tmp_path / "hook", tmp_path / "pids"
    hook.write_text(f"#!/bin/sh\necho $$ >>{pids}\nsleep 1000 &\necho $! >>{pids}\nwait\n")
    hook.chmod(0o755)
    relay = Relay(authority, tmp_path / "state", dns_hook=[str(hook)], dns_hook_timeout=0.5)
    with capture_logs() as logs:
        await nursery.start(relay.manager.run)
        await relay.wait(lambda: relay.failed)
    assert "took more than 0.5 s (acme.dns_hook_timeout)" in relay.failed[0]
    assert [line["name"] for line in logs if line["event"] == "no certificate"] == ["*.t.example.org"]

    def is_gone(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            return True

    await relay.wait(lambda: all(is_gone(int(pid)) for pid in pids.read_text().split()[:2]))
    nursery.cancel_scope.cancel()


async def test_an_authority_that_is_away_and_comes_back(tmp_path: Path, nursery: trio.Nursery) -> None:
    with running_authority(tmp_path / "pebble") as authority:
        away = replace(authority, directory="https://localhost:1/dir")
        relay = Relay(away, tmp_path / "state", dns_hook=authority.hook)
        await nursery.start(relay.manager.run)
        await relay.wait(lambda: len(relay.failed) >= 2)
        assert "could not reach the authority" in relay.failed[0]
        relay.settings = relay.settings.model_copy(update={"directory": authority.directory})
        relay.manager.reconfigure()
        await relay.wait(lambda: relay.store.stored_for("*.t.example.org"))
        assert relay.manager.problems() == []
    nursery.cancel_scope.cancel()


PROGRAM = """
import sys, trio
from pathlib import Path
from tests.acme.test_orders import Relay
from tests.support.authority import Authority
import json

facts = json.loads(sys.argv[1])
authority = Authority(**{**facts, "ca_file": Path(facts["ca_file"]), "folder": Path(facts["folder"])})
relay = Relay(authority, Path(sys.argv[2]), dns_hook=sys.argv[3:])
trio.run(relay.manager.run)
"""


async def test_a_kill_between_order_and_certificate(tmp_path: Path, nursery: trio.Nursery) -> None:
    """The process is killed while the authority waits for the challenge; the next one orders again."""
    with running_authority(tmp_path / "pebble") as authority:
        hook, called = tmp_path / "hook", tmp_path / "called"
        hook.write_text(f"#!/bin/sh\ntouch {called}\nexec sleep 20\n")
        hook.chmod(0o755)
        facts = json.dumps(vars(authority), default=str)
        state = tmp_path / "state"
        command = [sys.executable, "-c", PROGRAM, facts, str(state), str(hook)]
        environment = os.environ | {"PYTHONPATH": ":".join(sys.path)}
        with subprocess.Popen(command, env=environment) as process:  # noqa: ASYNC220 - it starts at once
            relay = Relay(authority, state, dns_hook=authority.hook)
            await relay.wait(called.exists)
            process.send_signal(signal.SIGKILL)
        account = account_folder(state, authority.directory) / "account.key"
        key = account.read_bytes()
        assert list(certificate_folder(state).glob("*")) == []
        await nursery.start(relay.manager.run)
        await relay.wait(lambda: relay.store.stored_for("*.t.example.org"))
        assert account.read_bytes() == key  # the same account
        assert relay.failed == []
        (file,) = certificate_folder(state).glob("*.pem")
        assert file.stat().st_mode & 0o777 == 0o600
        assert [each for each in certificate_folder(state).iterdir() if each.name.startswith(".new")] == []
    nursery.cancel_scope.cancel()


async def test_without_a_state_folder_nothing_is_ordered() -> None:
    settings = AcmeSettings(enabled=True, agree=True)
    manager = CertificateManager(CertificateStore(), lambda: settings, None)
    with pytest.raises(UsageError, match=r"set daemon\.state"):
        await manager.trial("a.example.org", lambda _: None)
