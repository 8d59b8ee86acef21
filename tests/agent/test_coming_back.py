"""The relay goes, and the agent comes back; what is for good ends it."""

from __future__ import annotations

import pytest
import trio

from tests.agent.support import PATIENCE, Told, access_to, agent, echo, exposed, local_server, relay_here, unused_port
from tests.agent.test_expose import address, ask
from tests.support.people import connect, read_exactly
from tunneld.agent import backoff, session
from tunneld.agent.access import RelayAccess
from tunneld.agent.pool import PoolLimits
from tunneld.agent.request import TunnelRequest
from tunneld.errors import RefusedError, RelayUnreachableError
from tunneld.net.endpoint import Target
from tunneld.policy.access import Grant, Role
from tunneld.wire.lines import Value

ROOT = Grant("root", Role.ADMIN)

pytestmark = pytest.mark.usefixtures("each_backend")


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds of waiting add nothing to what is tested here."""
    monkeypatch.setattr(backoff.delays, "__kwdefaults__", {"first": 0.01, "longest": 0.02})


async def _one_after_another(
    port: int, end: trio.Event, begin: trio.Event, *, task_status: trio.TaskStatus[None]
) -> None:
    """Two relays on the same control port: the first until `end`, the second from `begin` on."""
    async with relay_here(port):
        task_status.started()
        await end.wait()
    await begin.wait()
    async with relay_here(port):
        await trio.sleep_forever()


async def test_after_a_restart_of_the_relay_the_agent_is_back_at_the_same_address(nursery: trio.Nursery) -> None:
    told, end, begin, port = Told(), trio.Event(), trio.Event(), unused_port()
    await nursery.start(_one_after_another, port, end, begin)
    with trio.fail_after(PATIENCE):
        async with local_server(echo) as target, exposed(target, access_to(port), told):
            end.set()
            await told.wait_for("reconnecting", 3)
            begin.set()
            await told.wait_for("opened", 2)
            assert f":{port}" in str(told.all("reconnecting")[0]["reason"])
            assert address(told, 1) == address(told, 0)
            assert await ask(address(told, 1), b"again") == b"again"
    nursery.cancel_scope.cancel()


async def test_a_tunnel_that_the_relay_lost_is_opened_again_at_the_same_address() -> None:
    told = Told()
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay, local_server(echo) as target, exposed(target, relay.access, told):
            relay.tunnel.close("a mishap")
            await told.wait_for("opened", 2)
            assert told.all("reconnecting")[0]["reason"] == "tunnel t1 was closed at the relay"
            assert address(told, 1) == address(told, 0)
            assert await ask(address(told, 1), b"again") == b"again"


async def test_a_lost_control_connection_alone_is_noticed_costs_no_visitor_and_keeps_the_tunnel() -> None:
    told = Told()
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay, local_server(echo) as target:
            async with exposed(target, relay.access, told):
                stream = await connect(address(told))
                await stream.send_all(b"before")
                assert await read_exactly(stream, 6) == b"before"
                relay.hang_up()
                assert (await told.wait_for("resumed"))["id"] == "t1"
                await stream.send_all(b"after")
                assert await read_exactly(stream, 5) == b"after"
                assert await ask(address(told), b"new") == b"new"
            assert [event for event, _ in told.events if event in {"opened", "resumed", "closed"}] == [
                "opened",
                "resumed",
                "closed",
            ]
            assert list(relay.service.tunnels()) == []


async def test_visitors_of_a_draining_tunnel_finish(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "RESIZE_INTERVAL", 0.05)
    told = Told()
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay, local_server(echo) as target, exposed(target, relay.access, told):
            stream = await connect(address(told))
            await stream.send_all(b"before")
            assert await read_exactly(stream, 6) == b"before"
            relay.tunnel.drain()
            await told.wait_for("opened", 2)
            assert told.all("reconnecting")[0]["reason"] == "tunnel t1 is being drained at the relay"
            await stream.send_all(b"after")
            assert await read_exactly(stream, 5) == b"after"


async def test_a_tunnel_that_somebody_closed_is_not_opened_again() -> None:
    told, why = Told(), "tunnel t1 was closed by request of root"
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay, local_server(echo) as target:
            with pytest.RaisesGroup(pytest.RaisesExc(RefusedError, match=f"^{why}$"), flatten_subgroups=True):
                async with exposed(target, relay.access, told):
                    await relay.service.close("t1", ROOT)
                    await trio.sleep_forever()
            assert told.all("closed")[0]["reason"] == why
            assert list(relay.service.tunnels()) == []


async def test_of_a_tunnel_that_somebody_drains_the_visitors_finish_and_it_is_not_opened_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(session, "RESIZE_INTERVAL", 0.05)
    told = Told()
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay, local_server(echo) as target:
            with pytest.RaisesGroup(pytest.RaisesExc(RefusedError, match="drained by request"), flatten_subgroups=True):
                async with exposed(target, relay.access, told):
                    stream = await connect(address(told))
                    await stream.send_all(b"before")
                    assert await read_exactly(stream, 6) == b"before"
                    relay.service.drain_one("t1", ROOT)
                    assert await told.wait_for("draining") == {"id": "t1", "visitors": 1}
                    await stream.send_all(b"after")
                    assert await read_exactly(stream, 5) == b"after"
                    await stream.aclose()
                    await trio.sleep_forever()
            assert told.all("left")[0]["reason"] == "finished"
            assert list(relay.service.tunnels()) == []


async def test_an_agent_whose_name_another_one_took_over_waits_until_that_ends() -> None:
    """Two devices of one name, cloned say, must not take it from each other for ever."""
    old, new, wish = Told(), Told(), TunnelRequest({"name": "device"})
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay, local_server(echo) as target, exposed(target, relay.access, old, wish):
            async with exposed(target, relay.access, new, wish):
                for _ in range(3):
                    lost = await old.wait_for("reconnecting", len(old.all("reconnecting")) + 1)
                assert "tunnel 'device' is served by another agent, 127.0.0.1" in str(lost["reason"])
                assert "(t2); stop that agent, or use another name" in str(lost["reason"])
                assert await ask(address(new), b"new") == b"new"
                assert not new.all("reconnecting")
            await old.wait_for("opened", 2)
            assert address(old, 1) == address(old, 0) == address(new, 0)


async def test_the_first_attempt_fails_at_once() -> None:
    told = Told()
    access = RelayAccess(f"127.0.0.1:{unused_port()}")
    with trio.fail_after(PATIENCE), pytest.RaisesGroup(RelayUnreachableError, flatten_subgroups=True):
        async with agent(Target.parse("1"), access, told) as exposure:
            await exposure.run()
    assert [event for event, _ in told.events] == ["trouble"], "nothing listens at the target, that is all"


async def test_a_refusal_for_good_carries_the_relays_code() -> None:
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay:
            with pytest.RaisesGroup(
                pytest.RaisesExc(RefusedError, check=lambda error: error.status == 64), flatten_subgroups=True
            ):
                async with agent(Target.parse("1"), relay.access, Told(), TunnelRequest({"name": "a b"})) as exposure:
                    await exposure.run()


async def test_the_end_of_the_ttl_is_the_end_of_the_agent() -> None:
    told = Told()
    with trio.fail_after(PATIENCE):
        async with (
            relay_here() as relay,
            agent(Target.parse("1"), relay.access, told, TunnelRequest({"ttl": 0.2})) as exposure,
        ):
            await exposure.run()
    assert told.all("closed")[0]["reason"] == "lifetime of 0.2 s is over (ttl)"


async def test_a_pool_grows_with_its_visitors_and_shrinks_without_losing_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "RESIZE_INTERVAL", 0.02)
    told = Told(wants_visitors=False)
    with trio.fail_after(PATIENCE):
        async with (
            relay_here() as relay,
            local_server(echo) as target,
            exposed(target, relay.access, told, TunnelRequest(limits=PoolLimits(2, 64), backend="tcp")) as exposure,
        ):
            streams = [await connect(address(told)) for _ in range(40)]
            largest = 0
            while exposure.figures.now < 40 or largest <= 2:
                largest = max(largest, exposure.figures.parked)
                await trio.lowlevel.checkpoint()
            while exposure.figures.parked > 2 or relay.tunnel.parked > 2:
                await trio.lowlevel.checkpoint()
            for stream in streams:
                await stream.send_all(b"still here")
                assert await read_exactly(stream, 10) == b"still here"
            assert await ask(address(told), b"new") == b"new"
            assert exposure.figures.failed == 0
            assert not told.all("trouble")


async def test_a_pool_that_the_relay_emptied_is_filled_again() -> None:
    told = Told()
    with trio.fail_after(PATIENCE):
        async with (
            relay_here() as relay,
            local_server(echo) as target,
            exposed(target, relay.access, told, TunnelRequest(limits=PoolLimits(4, 4), backend="tcp")),
        ):
            while relay.tunnel.parked < 4:
                await trio.lowlevel.checkpoint()
            relay.tunnel.trim(0, "127.0.0.1")
            await told.wait_for("trouble")
            while relay.tunnel.parked < 4:
                await trio.lowlevel.checkpoint()
            assert await ask(address(told), b"served") == b"served"


async def test_a_relay_that_drops_parked_connections_is_not_dialled_in_a_tight_loop() -> None:
    told = Told()
    with trio.fail_after(PATIENCE):
        async with (
            relay_here(max_parked=1) as relay,
            local_server(echo) as target,
            exposed(target, relay.access, told, TunnelRequest(limits=PoolLimits(4, 4), backend="tcp")),
        ):
            reason = str((await told.wait_for("trouble"))["reason"])
            assert reason.startswith(f"parked connections to {relay.tunnel.server_uri.without_key}: ")
            assert await ask(address(told), b"still served") == b"still served"


async def test_the_end_of_the_idle_timeout_is_the_end_of_the_agent() -> None:
    told = Told()
    with trio.fail_after(PATIENCE):
        async with (
            relay_here() as relay,
            agent(Target.parse("1"), relay.access, told, TunnelRequest({"idle_timeout": 0.2})) as exposure,
        ):
            await exposure.run()
    assert told.all("closed")[0]["reason"] == "no data for 0.2 s (idle_timeout)"


async def test_who_opens_a_tunnel_of_its_own_name_anew_takes_its_address_over(each_backend: str) -> None:
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay, relay.access.connect() as client:
            options: dict[str, Value] = {"persist": True, "name": "web", "secure": relay.papers is not None}
            first = await client.open_tunnel(each_backend, **options)
            other = await client.open_tunnel(each_backend, **{**options, "name": "another"})
            former, _ = relay.service.tunnels()
            address = await client.get_tunnel_address(first)
            again = await client.open_tunnel(each_backend, **options)
            assert former.reason == "replaced by a new tunnel of the same name and owner"
            assert again == first
            assert await client.get_tunnel_address(again) == address
            assert await client.get_tunnel_address(other) != address
            assert [tunnel.id for tunnel in relay.service.tunnels()] == ["t2", "t3"]


async def test_an_agent_that_was_killed_has_its_address_back_at_once() -> None:
    told = Told()
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay, local_server(echo) as target, trio.open_nursery() as nursery:
            nursery.start_soon(run_and_vanish, target, relay.access, told)
            await told.wait_for("opened")
            visitor = await connect(address(told))
            await visitor.send_all(b"hello")
            assert await read_exactly(visitor, 5) == b"hello"
            nursery.cancel_scope.cancel()
            again = Told()
            async with exposed(target, relay.access, again, TunnelRequest({"name": "web"})):
                assert address(again) == address(told)
                assert await ask(address(again), b"again") == b"again"


async def run_and_vanish(target: Target, access: RelayAccess, told: Told) -> None:
    """An agent that closes nothing: for the relay its tunnel stands."""
    async with agent(target, access, told, TunnelRequest({"name": "web"})) as exposure:
        exposure.close = trio.lowlevel.checkpoint  # type: ignore[method-assign]
        try:
            await exposure.run()
        finally:
            assert exposure._keeper is not None
            exposure._keeper.supply.close()  # as a kernel does
