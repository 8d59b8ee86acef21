"""The agent reconnects after a loss; permanent refusals and the end of the tunnel's lifetime end it."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

import pytest
import trio

from tests.agent.support import (
    NEEDED,
    PATIENCE,
    RecordingReporter,
    access_to,
    agent,
    echo,
    exposed,
    local_server,
    relay_here,
    unused_port,
)
from tests.agent.test_expose import address, ask
from tests.agent.test_expose_secret import with_secret
from tests.control.test_daemon_auth import running
from tests.support.credentials import SECRET
from tests.support.peers import connect, read_exactly, reset
from tests.support.programs import EGTP
from tunneld.agent import backoff, session
from tunneld.agent.access import RelayAccess
from tunneld.agent.pool import PoolLimits
from tunneld.agent.request import TunnelRequest
from tunneld.errors import EX_EXPIRED, RefusedError, RelayUnreachableError
from tunneld.net.endpoint import Target
from tunneld.policy.access import Grant, Role
from tunneld.wire.lines import Value

ROOT = Grant("root", Role.ADMIN)

pytestmark = pytest.mark.usefixtures("each_backend")


@pytest.fixture(autouse=True)
def _short_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long delays add nothing to what is tested here."""
    monkeypatch.setattr(backoff, "FIRST_DELAY", 0.01)
    monkeypatch.setattr(backoff, "MAX_DELAY", 0.02)


async def _run_two_relays(port: int, end: trio.Event, begin: trio.Event, *, task_status: trio.TaskStatus[None]) -> None:
    """Two relays on the same control port: the first until `end`, the second from `begin` on."""
    async with relay_here(port):
        task_status.started()
        await end.wait()
    await begin.wait()
    async with relay_here(port):
        await trio.sleep_forever()


async def test_after_a_restart_of_the_relay_the_tunnel_has_the_same_address(nursery: trio.Nursery) -> None:
    reporter, end, begin, port = RecordingReporter(), trio.Event(), trio.Event(), unused_port()
    await nursery.start(_run_two_relays, port, end, begin)
    with trio.fail_after(PATIENCE):
        async with local_server(echo) as target, exposed(target, access_to(port), reporter):
            end.set()
            await reporter.wait_for("reconnecting", 3)
            begin.set()
            await reporter.wait_for("opened", 2)
            assert f":{port}" in str(reporter.all("reconnecting")[0]["reason"])
            assert address(reporter, 1) == address(reporter, 0)
            assert await ask(address(reporter, 1), b"again") == b"again"
    nursery.cancel_scope.cancel()


async def test_a_tunnel_that_the_relay_lost_is_opened_again_at_the_same_address() -> None:
    reporter = RecordingReporter()
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay, local_server(echo) as target, exposed(target, relay.access, reporter):
            relay.tunnel.close("a mishap")
            await reporter.wait_for("opened", 2)
            assert reporter.all("reconnecting")[0]["reason"] == "tunnel t1 was closed at the relay"
            assert address(reporter, 1) == address(reporter, 0)
            assert await ask(address(reporter, 1), b"again") == b"again"


async def test_losing_only_the_control_connection_drops_no_visitor_and_keeps_the_tunnel() -> None:
    reporter = RecordingReporter()
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay, local_server(echo) as target:
            async with exposed(target, relay.access, reporter):
                stream = await connect(address(reporter))
                await stream.send_all(b"before")
                assert await read_exactly(stream, 6) == b"before"
                relay.hang_up()
                assert (await reporter.wait_for("resumed"))["id"] == "t1"
                await stream.send_all(b"after")
                assert await read_exactly(stream, 5) == b"after"
                assert await ask(address(reporter), b"new") == b"new"
            assert [event for event, _ in reporter.events if event in {"opened", "resumed", "closed"}] == [
                "opened",
                "resumed",
                "closed",
            ]
            assert list(relay.service.tunnels()) == []


async def test_visitors_of_a_draining_tunnel_finish(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "REVIEW_INTERVAL", 0.05)
    reporter = RecordingReporter()
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay, local_server(echo) as target, exposed(target, relay.access, reporter):
            stream = await connect(address(reporter))
            await stream.send_all(b"before")
            assert await read_exactly(stream, 6) == b"before"
            relay.tunnel.drain()
            await reporter.wait_for("opened", 2)
            assert reporter.all("reconnecting")[0]["reason"] == "tunnel t1 is being drained at the relay"
            await stream.send_all(b"after")
            assert await read_exactly(stream, 5) == b"after"


async def test_a_tunnel_that_was_closed_on_request_is_not_opened_again() -> None:
    reporter, why = RecordingReporter(), "tunnel t1 was closed by request of root"
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay, local_server(echo) as target:
            with pytest.RaisesGroup(pytest.RaisesExc(RefusedError, match=f"^{why}$"), flatten_subgroups=True):
                async with exposed(target, relay.access, reporter):
                    await relay.service.close("t1", ROOT)
                    await trio.sleep_forever()
            assert reporter.all("closed")[0]["reason"] == why
            assert list(relay.service.tunnels()) == []


async def test_a_visitor_that_the_relay_cut_is_reported_with_the_true_cause() -> None:
    reporter, why = RecordingReporter(), "tunnel t1 was closed by request of root"
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay, local_server(echo) as target:
            with pytest.RaisesGroup(RefusedError, flatten_subgroups=True):
                async with exposed(target, relay.access, reporter), await connect(address(reporter)) as stream:
                    await stream.send_all(b"before")
                    assert await read_exactly(stream, 6) == b"before"
                    await relay.service.close("t1", ROOT)
                    await trio.sleep_forever()
            assert [left["reason"] for left in reporter.all("left")] == [why]


async def test_a_visitor_that_breaks_its_connection_is_reported_as_that() -> None:
    reporter = RecordingReporter()
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay, local_server(echo) as target, exposed(target, relay.access, reporter):
            stream = await connect(address(reporter))
            await stream.send_all(b"before")
            assert await read_exactly(stream, 6) == b"before"
            reset(stream)
            assert str((await reporter.wait_for("left"))["reason"]).startswith("connection to the visitor failed")


async def test_a_tunnel_that_is_drained_on_request_lets_visitors_finish_and_is_not_opened_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(session, "REVIEW_INTERVAL", 0.05)
    reporter = RecordingReporter()
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay, local_server(echo) as target:
            with pytest.RaisesGroup(pytest.RaisesExc(RefusedError, match="drained by request"), flatten_subgroups=True):
                async with exposed(target, relay.access, reporter):
                    stream = await connect(address(reporter))
                    await stream.send_all(b"before")
                    assert await read_exactly(stream, 6) == b"before"
                    await relay.service.drain_one("t1", ROOT)
                    assert await reporter.wait_for("draining") == {"id": "t1", "visitors": 1}
                    await stream.send_all(b"after")
                    assert await read_exactly(stream, 5) == b"after"
                    await stream.aclose()
                    await trio.sleep_forever()
            assert reporter.all("left")[0]["reason"] == "finished"
            assert list(relay.service.tunnels()) == []


async def test_an_agent_whose_name_was_taken_over_waits_until_the_other_one_ends() -> None:
    """Two devices with one name, for example clones, must not take it from each other in turn."""
    old, new, request = RecordingReporter(), RecordingReporter(), TunnelRequest({"name": "device"})
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay, local_server(echo) as target, exposed(target, relay.access, old, request):
            async with exposed(target, relay.access, new, request):
                for _ in range(3):
                    lost = await old.wait_for("reconnecting", len(old.all("reconnecting")) + 1)
                assert "tunnel 'device' is served by another agent, 127.0.0.1" in str(lost["reason"])
                assert "(t2); stop that agent, or use another name" in str(lost["reason"])
                assert await ask(address(new), b"new") == b"new"
                assert not new.all("reconnecting")
            await old.wait_for("opened", 2)
            assert address(old, 1) == address(old, 0) == address(new, 0)


async def test_the_first_attempt_fails_at_once() -> None:
    reporter = RecordingReporter()
    access = RelayAccess(f"127.0.0.1:{unused_port()}")
    with trio.fail_after(PATIENCE), pytest.RaisesGroup(RelayUnreachableError, flatten_subgroups=True):
        async with agent(Target.parse("1"), access, reporter) as exposure:
            await exposure.run()
    assert [event for event, _ in reporter.events] == ["trouble"], "only that nothing listens at the target"


async def test_a_permanent_refusal_has_the_relays_code() -> None:
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay:
            with pytest.RaisesGroup(
                pytest.RaisesExc(RefusedError, check=lambda error: error.status == 64), flatten_subgroups=True
            ):
                async with agent(
                    Target.parse("1"), relay.access, RecordingReporter(), TunnelRequest({"name": "a b"})
                ) as exposure:
                    await exposure.run()


async def test_the_agent_ends_when_the_ttl_has_passed() -> None:
    reporter = RecordingReporter()
    with trio.fail_after(PATIENCE):
        async with (
            relay_here() as relay,
            agent(Target.parse("1"), relay.access, reporter, TunnelRequest({"ttl": 0.2})) as exposure,
        ):
            await exposure.run()
    assert reporter.all("closed")[0]["reason"] == "lifetime of 0.2 s is over (ttl)"


async def test_an_agent_whose_tunnel_has_used_up_its_quota_ends_with_that_reason() -> None:
    reporter, request = RecordingReporter(), TunnelRequest({"quota": "10k", "name": "web"})
    why = "tunnel t1 has ended: quota of 10000 bytes is used up (quota)"
    refused = pytest.RaisesExc(
        RefusedError, match=f"^{re.escape(why)}$", check=lambda error: error.status == EX_EXPIRED
    )
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay, local_server(echo) as target:
            with pytest.RaisesGroup(refused, flatten_subgroups=True):
                async with exposed(target, relay.access, reporter, request), await connect(address(reporter)) as stream:
                    await stream.send_all(bytes(6_000))
                    await trio.sleep_forever()
            assert reporter.all("closed")[0]["reason"] == why
            assert not reporter.all("reconnecting")
            assert list(relay.service.tunnels()) == []


async def test_a_quota_counts_for_all_tunnels_of_a_name_until_the_reservation_is_released(each_backend: str) -> None:
    options: dict[str, Value] = {"name": "web", "quota": "10k", "persist": True}
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay, local_server(echo) as target, relay.access.connect() as client:
            for size in (3_000, 4_000):
                reporter = RecordingReporter()
                with suppress(BaseExceptionGroup):
                    async with exposed(target, relay.access, reporter, TunnelRequest({"name": "web", "quota": "10k"})):
                        tunnel = relay.tunnel
                        async with await connect(address(reporter)) as stream:
                            await stream.send_all(bytes(size))
                            with suppress(trio.BrokenResourceError):
                                assert await read_exactly(stream, size) == bytes(size)
                            if size == 4_000:
                                await tunnel.wait_closed()
            assert tunnel.reason == "quota of 10000 bytes is used up (quota)", "6000 were used before"
            with pytest.raises(RefusedError, match=r"'web' is used up until .* \(quota\)$") as refused:
                await client.open_tunnel(each_backend, **NEEDED[each_backend], **options)
            assert refused.value.reply_code == "expired"
            await client.call("release", "web")
            assert await client.open_tunnel(each_backend, **NEEDED[each_backend], **options)


async def test_an_agent_whose_tunnel_may_live_no_longer_ends_with_that_reason(
    tmp_path: Path, each_backend: str
) -> None:
    """The ttl that the credential permits, which the agent did not ask for and does not know."""
    config, reporter = tmp_path / "tunnel.toml", RecordingReporter()
    config.write_text(with_secret(SECRET).replace('name = "alice"', 'name = "alice"\nmax_ttl = 0.2') + EGTP)
    why = r"^tunnel t1 has ended: lifetime of 0\.2 s is over \(ttl\)$"
    async with running(config) as relay:
        alice = RelayAccess(relay.control, credential=("alice", SECRET))
        with pytest.RaisesGroup(pytest.RaisesExc(RefusedError, match=why), flatten_subgroups=True):
            async with agent(Target.parse("1"), alice, reporter) as exposure:
                await exposure.run()
        assert len(reporter.all("opened")) == 1


async def test_a_pool_grows_with_its_visitors_and_shrinks_without_losing_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "REVIEW_INTERVAL", 0.02)
    reporter = RecordingReporter(wants_visitors=False)
    with trio.fail_after(PATIENCE):
        async with (
            relay_here() as relay,
            local_server(echo) as target,
            exposed(target, relay.access, reporter, TunnelRequest(limits=PoolLimits(2, 64), backend="tcp")) as exposure,
        ):
            streams = [await connect(address(reporter)) for _ in range(40)]
            largest = 0
            while exposure.stats.now < 40 or largest <= 2:
                largest = max(largest, exposure.stats.parked)
                await trio.lowlevel.checkpoint()
            while exposure.stats.parked > 2 or relay.tunnel.parked > 2:
                await trio.lowlevel.checkpoint()
            for stream in streams:
                await stream.send_all(b"still here")
                assert await read_exactly(stream, 10) == b"still here"
            assert await ask(address(reporter), b"new") == b"new"
            assert exposure.stats.failed == 0
            assert not reporter.all("trouble")


async def test_a_pool_that_the_relay_emptied_is_refilled() -> None:
    reporter = RecordingReporter()
    with trio.fail_after(PATIENCE):
        async with (
            relay_here() as relay,
            local_server(echo) as target,
            exposed(target, relay.access, reporter, TunnelRequest(limits=PoolLimits(4, 4), backend="tcp")),
        ):
            while relay.tunnel.parked < 4:
                await trio.lowlevel.checkpoint()
            relay.tunnel.trim(0, "127.0.0.1")
            await reporter.wait_for("trouble")
            while relay.tunnel.parked < 4:
                await trio.lowlevel.checkpoint()
            assert await ask(address(reporter), b"served") == b"served"


async def test_a_relay_that_drops_parked_connections_is_not_dialled_in_a_tight_loop() -> None:
    reporter = RecordingReporter()
    with trio.fail_after(PATIENCE):
        async with (
            relay_here(max_parked=1) as relay,
            local_server(echo) as target,
            exposed(target, relay.access, reporter, TunnelRequest(limits=PoolLimits(4, 4), backend="tcp")),
        ):
            reason = str((await reporter.wait_for("trouble"))["reason"])
            uri = relay.tunnel.server_uri
            refused = f"the relay refused the connection to {uri.without_key}: "
            assert reason.startswith(refused if uri.key else "connection to the relay lost: ")
            assert await ask(address(reporter), b"still served") == b"still served"


async def test_the_agent_ends_when_the_idle_timeout_has_passed() -> None:
    reporter = RecordingReporter()
    with trio.fail_after(PATIENCE):
        async with (
            relay_here() as relay,
            agent(Target.parse("1"), relay.access, reporter, TunnelRequest({"idle_timeout": 0.2})) as exposure,
        ):
            await exposure.run()
    assert reporter.all("closed")[0]["reason"] == "tunnel t1 has ended: no data for 0.2 s (idle_timeout)"


async def test_a_tunnel_opened_again_with_the_same_name_keeps_its_address(each_backend: str) -> None:
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay, relay.access.connect() as client:
            options: dict[str, Value] = {"persist": True, "name": "web", "secure": relay.pki is not None}
            first = await client.open_tunnel(each_backend, **NEEDED[each_backend], **options)
            other = await client.open_tunnel(each_backend, **NEEDED[each_backend], **{**options, "name": "another"})
            former, _ = relay.service.tunnels()
            address = await client.get_tunnel_address(first)
            again = await client.open_tunnel(each_backend, **NEEDED[each_backend], **options)
            assert former.reason == "replaced by a new tunnel of the same name and owner"
            assert again == first
            assert await client.get_tunnel_address(again) == address
            assert await client.get_tunnel_address(other) != address
            assert [tunnel.id for tunnel in relay.service.tunnels()] == ["t2", "t3"]


async def test_an_agent_that_was_killed_gets_its_address_back_at_once() -> None:
    reporter = RecordingReporter()
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay, local_server(echo) as target, trio.open_nursery() as nursery:
            nursery.start_soon(run_and_vanish, target, relay.access, reporter)
            await reporter.wait_for("opened")
            visitor = await connect(address(reporter))
            await visitor.send_all(b"hello")
            assert await read_exactly(visitor, 5) == b"hello"
            nursery.cancel_scope.cancel()
            again = RecordingReporter()
            async with exposed(target, relay.access, again, TunnelRequest({"name": "web"})):
                assert address(again) == address(reporter)
                assert await ask(address(again), b"again") == b"again"


async def run_and_vanish(target: Target, access: RelayAccess, reporter: RecordingReporter) -> None:
    """Run an agent that closes nothing at the relay when it ends."""
    async with agent(target, access, reporter, TunnelRequest({"name": "web"})) as exposure:
        exposure.close = trio.lowlevel.checkpoint  # type: ignore[method-assign]
        try:
            await exposure.run()
        finally:
            assert exposure.session is not None
            exposure.session.source.close()  # as the kernel does
