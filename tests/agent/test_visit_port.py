"""The port of `tunnel visit`, and its sessions: many clients in one, losses, idleness, one-time codes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from tests.agent.support import (
    PATIENCE,
    SECURE,
    RecordingReporter,
    RelayHere,
    access_to,
    echo,
    local_server,
    relay_here,
    unused_port,
)
from tests.support.peers import is_dropped, read_all
from tests.support.pki import Pki
from tests.support.private import (
    ALICE,
    BOB,
    CAROL,
    SHELL,
    Middle,
    Visiting,
    in_the_middle,
    make_home,
    privately_exposed,
    visit_port,
)
from tunneld.agent.invitations import Invitations
from tunneld.agent.visit import VisitedTunnel
from tunneld.agent.visit_sessions import VisitLimits
from tunneld.config.trust import TrustedPeers
from tunneld.errors import RefusedError
from tunneld.mux.carrier import MAX_CHANNELS
from tunneld.net.endpoint import Target
from tunneld.tls.one_time import OneTimeCode


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return make_home(tmp_path, monkeypatch)


@pytest.fixture
async def relay() -> AsyncIterator[RelayHere]:
    with trio.fail_after(PATIENCE):
        async with relay_here() as running:
            yield running


@pytest.fixture
def reporter() -> RecordingReporter:
    """That of the host."""
    return RecordingReporter()


async def ask(there: Visiting, question: bytes) -> bytes:
    """Send something, end, and return everything that comes."""
    async with await there.connect() as client:
        await client.send_all(question)
        await client.send_eof()
        return await read_all(client)


async def is_cut(there: Visiting) -> bool:
    """Whether a new client gets nothing."""
    async with await there.connect() as client:
        return await is_dropped(client)


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await trio.lowlevel.checkpoint()


async def test_all_clients_share_one_session(relay: RelayHere, keys: Path, reporter: RecordingReporter) -> None:
    async with (
        local_server(echo) as target,
        privately_exposed(target, relay.access, reporter, keys, "bob"),
        visit_port(relay.access) as there,
    ):
        assert there.reporter.all("connected") == [{"peer": "shell@alice", "id": str(ALICE.id)}]
        for said in (b"one", b"two"):
            assert await ask(there, said) == said
        assert (await there.reporter.wait_for("visiting", 2))["id"] == str(ALICE.id)
        assert (await there.reporter.wait_for("left", 2))["reason"] == "both sides finished"
        assert [(one["peer"], one["id"]) for one in reporter.all("admitted")] == [("bob", str(BOB.id))]
        assert len(reporter.all("visitor")) == 2
        assert (relay.tunnel.served, len(relay.tunnel.visitors)) == (1, 1)


async def test_more_clients_than_a_session_has_room_for_get_another_one(
    relay: RelayHere, keys: Path, reporter: RecordingReporter
) -> None:
    async with (
        local_server(echo, backlog=1024) as target,
        privately_exposed(target, relay.access, reporter, keys, "bob"),
        visit_port(relay.access, VisitLimits(max_sessions=2, wait=0.1)) as there,
    ):
        clients = [await there.connect() for _ in range(2 * MAX_CHANNELS)]
        for number, client in enumerate(clients):
            await client.send_all(b"%03d" % number)
        for number, client in enumerate(clients):
            assert await client.receive_some() == b"%03d" % number
        assert len(there.sessions._sessions) == 2
        assert await is_cut(there)
        assert there.reporter.all("failed")[0]["reason"] == "all 2 sessions with shell@alice are full"
        await clients.pop().aclose()
        await there.reporter.wait_for("left")
        assert await ask(there, b"room") == b"room"
        for client in clients:
            await client.aclose()


async def test_a_refusal_of_the_local_server_is_one_clients_only(
    relay: RelayHere, keys: Path, reporter: RecordingReporter
) -> None:
    target = Target.parse(str(unused_port()))
    async with (
        privately_exposed(target, relay.access, reporter, keys, "bob"),
        visit_port(relay.access) as there,
    ):
        for number in (1, 2):
            assert await is_cut(there)
            assert "refused" in str((await reporter.wait_for("failed", 1))["reason"])
            await there.reporter.wait_for("left", number)
        assert len(there.reporter.all("connected")) == 1


async def test_a_peer_that_is_removed_gets_no_further_connection(
    relay: RelayHere, keys: Path, reporter: RecordingReporter
) -> None:
    async with (
        local_server(echo) as target,
        privately_exposed(target, relay.access, reporter, keys, "bob"),
        visit_port(relay.access) as there,
        await there.connect() as before,
    ):
        await before.send_all(b"here")
        assert await before.receive_some() == b"here"
        TrustedPeers().remove("bob")
        assert await is_cut(there)
        assert "not admitted any more: bob" in str((await there.reporter.wait_for("left"))["reason"])
        await before.send_all(b"still")
        assert await before.receive_some() == b"still"


async def test_who_is_not_admitted_learns_it_at_the_start(
    relay: RelayHere, keys: Path, reporter: RecordingReporter
) -> None:
    carol = VisitedTunnel.known(SHELL, "shell@alice", CAROL)
    async with local_server(echo) as target, privately_exposed(target, relay.access, reporter, keys, "bob"):
        with pytest.RaisesGroup(
            pytest.RaisesExc(RefusedError, match="shell@alice refused the visit: not admitted"), flatten_subgroups=True
        ):
            async with visit_port(relay.access, tunnel=carol):
                pass


async def test_clients_wait_for_a_relay_that_comes_back(
    keys: Path, reporter: RecordingReporter, nursery: trio.Nursery
) -> None:
    end, begin, port = trio.Event(), trio.Event(), unused_port()
    await nursery.start(_run_two_relays, port, end, begin)
    with trio.fail_after(PATIENCE):
        async with (
            local_server(echo) as target,
            privately_exposed(target, access_to(port), reporter, keys, "bob"),
            visit_port(access_to(port)) as there,
        ):
            cut = await there.connect()
            await cut.send_all(b"before")
            assert await cut.receive_some() == b"before"
            end.set()
            assert await is_dropped(cut)
            await cut.aclose()
            assert "session with shell@alice lost" in str((await there.reporter.wait_for("reconnecting"))["reason"])
            async with await there.connect() as client:
                await client.send_all(b"waits")
                begin.set()
                assert await client.receive_some() == b"waits"
            assert len(there.reporter.all("connected")) == 2
    nursery.cancel_scope.cancel()


async def _run_two_relays(port: int, end: trio.Event, begin: trio.Event, *, task_status: trio.TaskStatus[None]) -> None:
    """Two relays on the same control port: the first until `end`, the second from `begin` on."""
    async with relay_here(port):
        task_status.started()
        await end.wait()
    await begin.wait()
    async with relay_here(port):
        await trio.sleep_forever()


async def test_a_relay_that_is_away_for_a_minute_needs_no_action(
    keys: Path, reporter: RecordingReporter, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    end, begin, port = trio.Event(), trio.Event(), unused_port()
    await nursery.start(_run_two_relays, port, end, begin)
    async with (
        local_server(echo) as target,
        privately_exposed(target, access_to(port), reporter, keys, "bob"),
        visit_port(access_to(port), VisitLimits(wait=90.0)) as there,
    ):
        assert await ask(there, b"before") == b"before"
        end.set()
        await trio.sleep(60)
        begin.set()
        assert await ask(there, b"after") == b"after"
        assert len(there.reporter.all("connected")) == 2
    nursery.cancel_scope.cancel()


async def test_a_client_does_not_wait_forever(keys: Path, autojump_clock: MockClock) -> None:
    """The relay is away for a minute: attempts go on, with growing delays."""
    async with visit_port(access_to(unused_port()), VisitLimits(wait=5.0)) as there:
        began = trio.current_time()
        assert await is_cut(there)
        assert trio.current_time() - began == pytest.approx(5.0, abs=0.5)
        assert "could not connect to" in str(there.reporter.all("failed")[0]["reason"])
        await trio.sleep(60)
        delays = [float(event["delay"]) for event in there.reporter.all("reconnecting")]
        assert delays[-1] > delays[0]
        assert 6 <= len(delays) <= 16


async def test_the_session_ends_when_it_is_idle_and_begins_again(
    relay: RelayHere, keys: Path, reporter: RecordingReporter
) -> None:
    async with (
        local_server(echo) as target,
        privately_exposed(target, relay.access, reporter, keys, "bob"),
        visit_port(relay.access, VisitLimits(idle_timeout=0.2)) as there,
    ):
        async with await there.connect() as client:
            await client.send_all(b"busy")
            assert await client.receive_some() == b"busy"
            await trio.sleep(0.4)  # a client that says nothing is one, too
            assert not there.reporter.all("idle")
        assert await there.reporter.wait_for("idle") == {"peer": "shell@alice", "seconds": 0.2}
        await until(lambda: not relay.tunnel.visitors)
        assert await ask(there, b"again") == b"again"
        assert len(there.reporter.all("connected")) == 2
        assert not there.reporter.all("reconnecting")


async def test_clients_go_to_another_session_once_this_machine_has_lost_its_address(
    relay: RelayHere, keys: Path, reporter: RecordingReporter
) -> None:
    async with (
        local_server(echo) as target,
        privately_exposed(target, relay.access, reporter, keys, "bob"),
        visit_port(relay.access) as there,
    ):
        assert await ask(there, b"before") == b"before"
        (first,) = there.sessions._sessions
        first._address = ("192.0.2.1", 1)
        first.carrier.send_buffer.blocked = True  # nothing that is sent from there arrives
        there.monitor.wake()
        assert not first.usable
        assert await ask(there, b"moved") == b"moved"
        assert len(there.sessions._sessions) == 2


async def test_an_agent_that_stops_lets_streams_finish_and_ends_the_session(
    relay: RelayHere, keys: Path, reporter: RecordingReporter
) -> None:
    async with (
        local_server(echo) as target,
        privately_exposed(target, relay.access, reporter, keys, "bob") as exposure,
        visit_port(relay.access) as there,
    ):
        client = await there.connect()
        await client.send_all(b"here")
        assert await client.receive_some() == b"here"
        exposure.drain("the test says so", PATIENCE)
        await until(lambda: not any(session.usable for session in there.sessions._sessions))
        await client.send_all(b"still")
        assert await client.receive_some() == b"still"
        await client.send_eof()
        assert await client.receive_some() == b""
        await client.aclose()
        await until(lambda: not there.sessions._sessions)


# One-time codes


def invite(relay: RelayHere) -> VisitedTunnel:
    """What a guest has after `tunnel invite`."""
    code = OneTimeCode.create()
    relay.service.privates.invite(SHELL, code.ticket, trio.current_time(), 60.0)
    Invitations().add("shell", code, 60.0)
    return VisitedTunnel.invited(code)


async def test_a_code_is_good_for_one_session(relay: RelayHere, keys: Path, reporter: RecordingReporter) -> None:
    over = trio.Event()
    async with (
        local_server(echo) as target,
        privately_exposed(target, relay.access, reporter, keys),
        visit_port(relay.access, tunnel=invite(relay), on_over=over.set) as there,
    ):
        for said in (b"one", b"two"):
            assert await ask(there, said) == said
        (session,) = there.sessions._sessions
        session.close("lost")
        await over.wait()
        assert await is_cut(there)
        assert there.reporter.all("failed")[0]["reason"] == "the one-time code is used up"


# A hostile relay


@pytest.mark.parametrize("direction", ["up", "down"])
@pytest.mark.parametrize("secure", [False, True])
async def test_a_session_that_was_tampered_with_ends_with_all_of_its_streams(
    keys: Path, reporter: RecordingReporter, direction: str, secure: bool, tmp_path: Path
) -> None:
    """Nothing is delivered twice or out of order, and both ends report it. With TLS to the relay, it is not that which
    finds it out: the session has left it.
    """
    SECURE.set(Pki.issue(tmp_path / "pki") if secure else None)
    async with (
        relay_here() as relay,
        in_the_middle(relay) as middle,
        local_server(echo) as target,
        privately_exposed(target, relay.access, reporter, keys, "bob"),
        visit_port(middle.access) as there,
    ):
        clients = [await there.connect() for _ in range(3)]
        for number, client in enumerate(clients):
            await client.send_all(b"first %d" % number)
            assert await client.receive_some() == b"first %d" % number
        if secure:
            (session,) = there.sessions._sessions
            below = session._connection._end._below  # type: ignore[attr-defined]  # the TLS to the relay
            assert (below._tls.sends_clear, below._tls.receives_clear) == (True, True)
        swap_records(middle, direction)
        got: dict[int, bytes] = {}

        async def talk(number: int, client: trio.SocketStream) -> None:
            """Send numbers until it is cut."""
            with suppress(trio.BrokenResourceError):
                for count in range(10_000):
                    await client.send_all(b"%05d" % count)

        async def listen(number: int, client: trio.SocketStream) -> None:
            with suppress(trio.BrokenResourceError):
                while data := await client.receive_some():
                    got[number] = got.get(number, b"") + data

        async with trio.open_nursery() as nursery:
            for number, client in enumerate(clients):
                nursery.start_soon(talk, number, client)
                nursery.start_soon(listen, number, client)
        for client in clients:
            await client.aclose()
        for passed in (bytes(middle.up), bytes(middle.down)):
            assert b"00001" not in passed
            assert b"first" not in passed
        for received in got.values():
            assert received == b"".join(b"%05d" % count for count in range(len(received) // 5))
        if direction == "down":
            reason = str((await there.reporter.wait_for("broken"))["reason"]).lower()
            assert "bad record mac" in reason or "record layer failure" in reason  # as OpenSSL has it
        else:
            assert "broken on its way" in str((await reporter.wait_for("failed"))["reason"])


def swap_records(middle: Middle, direction: str) -> None:
    """Have the relay pass the second of two pieces first, again and again."""
    held: list[bytes] = []

    def swap(data: bytes) -> bytes:
        if held:
            return data + held.pop()
        held.append(data)
        return b""

    setattr(middle, f"change_{direction}", swap)
