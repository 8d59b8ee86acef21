"""Limits of open tunnels change: by `set`, and by a reload of `allow_from` and `deny_from`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from tests.control.test_bans import Visited
from tests.control.test_daemon_auth import HEAD, Running, running, table
from tests.support.credentials import SECRET, credential
from tests.support.peers import read_exactly
from tunneld import Client, connect
from tunneld.config.keys import diff
from tunneld.config.schema import Settings, TunnelSettings
from tunneld.directory.changing import changed_spec
from tunneld.errors import RefusedError, UsageError
from tunneld.net.endpoint import Endpoint
from tunneld.policy.access import Grant
from tunneld.policy.options import TunnelOptions
from tunneld.tunnel.spec import TunnelSpec


@dataclass
class Changed:
    """A real relay with a tunnel of alice."""

    relay: Running
    alice: Client
    tunnel: Visited

    async def refuses(self, source: str) -> bool:
        """Whether a visitor from this address is refused; a reset may come before `connect` has returned."""
        before = int((await self.alice.call("show", "blog")).items[0]["refused"])
        try:
            async with await self.tunnel.connect(source) as stream:
                await stream.receive_some()
        except (OSError, trio.BrokenResourceError):
            return int((await self.alice.call("show", "blog")).items[0]["refused"]) == before + 1
        return False


@asynccontextmanager
async def with_tunnel(relay: Running) -> AsyncIterator[Changed]:
    async with connect(relay.control, credential=("alice", SECRET)) as alice:
        opened = await alice.open_described("tcp", persist="yes", name="blog")
        server, client = Endpoint.parse(opened["server"]), Endpoint.parse(opened["client"])
        yield Changed(relay, alice, Visited(relay.control, alice, opened["id"], server, client))


@pytest.fixture
async def changed(tmp_path: Path) -> AsyncIterator[Changed]:
    path = tmp_path / "tunnel.toml"
    path.write_text(HEAD + table("alice", "user") + table("root", "admin"))
    async with running(path) as relay, with_tunnel(relay) as changed:
        yield changed


async def test_networks_of_an_open_tunnel_change(changed: Changed) -> None:
    async with changed.tunnel.visitor("127.0.0.2") as present:
        reply = await changed.alice.call("set", "blog", deny_from="127.0.0.2", max_visitors=5)
        assert reply.text == f"changed {changed.tunnel.id}: deny_from=127.0.0.2/32 max_visitors=5"
        shown = (await changed.alice.call("show", "blog")).items[0]
        assert (shown["deny_from"], shown["max_visitors"]) == ("127.0.0.2/32", "5")
        assert await changed.refuses("127.0.0.2")
        await present.send_all(b"still here")
    async with changed.tunnel.visitor("127.0.0.3"):
        pass
    await changed.alice.call("set", "blog", deny_from="none")
    async with changed.tunnel.visitor("127.0.0.2"):
        pass


async def test_visitors_that_are_there_count(changed: Changed) -> None:
    async with changed.tunnel.visitor("127.0.0.2"):
        await changed.alice.call("set", "blog", max_per_source=1)
        assert await changed.refuses("127.0.0.2")
    async with changed.tunnel.visitor("127.0.0.2"):  # the first one has left
        await changed.alice.call("set", "blog", max_visitors=1, max_per_source="none")
        assert await changed.refuses("127.0.0.3")


async def test_a_quota_counts_what_was_relayed_before(changed: Changed) -> None:
    async with changed.tunnel.visitor("127.0.0.2"):  # 7 bytes
        with pytest.raises(RefusedError, match="option quota=7: 7 bytes have been relayed already"):
            await changed.alice.call("set", "blog", quota=7)
        await changed.alice.call("set", "blog", quota=10)
    hidden = await trio.open_tcp_stream(changed.tunnel.server.host, changed.tunnel.server.port)
    async with hidden, await changed.tunnel.connect("127.0.0.2") as visitor:
        await hidden.send_all(b"12345")
        assert await read_exactly(visitor, 3) == b"123"
        with pytest.raises(trio.BrokenResourceError):
            await visitor.receive_some()
    while await changed.alice.list():
        await trio.lowlevel.checkpoint()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "nothing to change"),
        ({"name": "shop"}, "option 'name' cannot be changed"),
        ({"bandwidth": "fast"}, "bandwidth='fast'"),
        ({"max_visitors": "20000"}, "exceeds the limit of this relay: 10000"),
    ],
)
async def test_what_cannot_be_set(changed: Changed, options: dict[str, str], says: str) -> None:
    with pytest.raises(RefusedError, match=says):
        await changed.alice.call("set", "blog", **options)


async def test_a_reload_applies_networks_to_open_tunnels_and_says_when_keys_apply(changed: Changed) -> None:
    path = changed.relay.path
    text = path.read_text()
    async with connect(changed.relay.control, credential=("root", SECRET)) as root:
        new = 'ports = "0"\ndeny_from = ["127.0.0.2"]\nbandwidth = 5\nreservation = 60.0\n'
        path.write_text(text.replace('ports = "0"\n', new) + "[daemon]\nspin = 0.0\n")
        items = (await root.call("reload")).items
        assert [(one["key"], one.get("old"), one["new"], one["applies"]) for one in items] == [
            ("tunnels.reservation", "604800.0", "60.0", "now"),
            ("tunnels.deny_from", "[]", '["127.0.0.2/32"]', "now"),
            ("tunnels.bandwidth", None, "5", "to new tunnels"),
            ("daemon.spin", "0.0001", "0.0", "after a restart"),
        ]
        assert await changed.refuses("127.0.0.2")
        path.write_text(text)
        await root.call("reload")
        async with changed.tunnel.visitor("127.0.0.2"):
            pass


def spec(**options: str) -> TunnelSpec:
    return TunnelSpec(
        id="t1", backend="tcp", options=TunnelOptions.parse(options), settings=TunnelSettings(), owner="alice@1",
        requester_host="192.0.2.1", advertised_host="relay", credential="alice",
    )  # fmt: skip


def test_the_limits_of_the_owner_and_of_the_relay_hold() -> None:
    grant, settings = Grant("alice", max_visitors=10, bandwidth=1000), TunnelSettings(quota=5000)
    wanted = {"bandwidth": "1M", "quota": "none", "max_visitors": "none"}
    limits = changed_spec(spec(), wanted, settings, grant, used=0).limits
    assert (limits.bandwidth, limits.quota, limits.max_visitors) == (1000, 5000, 10)
    with pytest.raises(UsageError, match="exceeds the limit of credential 'alice': 10"):
        changed_spec(spec(), {"max_visitors": "11"}, settings, grant, used=0)
    assert changed_spec(spec(), {"max_visitors": "3"}, settings, grant, used=0).changed == {"max_visitors"}
    raised = changed_spec(spec(), {"max_visitors": "50"}, TunnelSettings(max_visitors=50), Grant("alice"), used=0)
    assert raised.limits.max_visitors == 50
    small = changed_spec(spec(ttl="60"), {"bandwidth": "5"}, settings, Grant("alice", max_ttl=9), used=0)
    assert (small.limits.ttl, small.limits.quota) == (60, None)  # what was not asked for stays


def test_a_change_of_a_credential_says_when_it_applies() -> None:
    one = Settings(credential=(credential("a"),))
    other = Settings(credential=(credential("a", quota=5, max_tunnels=1),))
    assert {change.key: change.applies for change in diff(one, other)} == {
        "credential.a.max_tunnels": "now",
        "credential.a.quota": "to new tunnels",
    }
