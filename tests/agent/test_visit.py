"""Private tunnels from end to end, through a relay that may do what it likes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import trio

import tunneld
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
    using_backend,
)
from tests.support.pki import Pki
from tests.support.private import (
    ALICE,
    BOB,
    CAROL,
    SHELL,
    Middle,
    in_the_middle,
    make_home,
    privately_exposed,
    unchanged,
    visiting,
)
from tunneld.agent.invitations import Invitations
from tunneld.agent.visit import VisitedTunnel
from tunneld.config.trust import TrustedPeers
from tunneld.errors import RefusedError, RemoteProtocolError
from tunneld.net.address import Private
from tunneld.net.endpoint import Target
from tunneld.policy.private import PrivateClaim, claimed_text
from tunneld.tls.identity import Identity
from tunneld.tls.one_time import OneTimeCode
from tunneld.tunnel.ingress.private import VisitAnswers
from tunneld.wire.preamble import LEAVE_TLS

CANARY = b"do not read this "


@pytest.fixture(params=["webmux", "tcp", "egtp"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with using_backend(request.param):
        yield request.param


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
    return RecordingReporter()


async def answer(stream: trio.abc.HalfCloseableStream, said: bytes) -> bytes:
    """Say something, end, and return everything that comes."""
    await stream.send_all(said)
    await stream.send_eof()
    received = b""
    while data := await stream.receive_some():
        received += data
    return received


async def reverse(stream: trio.SocketStream) -> None:
    """Answer only after the end of file, which must have arrived as such."""
    with suppress(trio.BrokenResourceError):
        said = b"".join([bytes(data) async for data in stream])
        await stream.send_all(said[::-1])
        await stream.send_eof()


# Who gets in


@pytest.mark.parametrize("tls", [False, True])
async def test_an_admitted_visitor_reaches_the_server_and_both_ends_know_each_other(
    backend: str, tls: bool, keys: Path, tmp_path: Path, reporter: RecordingReporter
) -> None:
    SECURE.set(Pki.issue(tmp_path / "pki") if tls else None)
    async with (
        relay_here() as relay,
        local_server(reverse) as target,
        privately_exposed(target, relay.access, reporter, keys, "bob"),
        visiting(relay.access) as stream,
    ):
        assert await answer(stream, b"hello") == b"olleh"
        admitted = await reporter.wait_for("admitted")
        assert (admitted["peer"], admitted["id"]) == ("bob", str(BOB.id))
        assert reporter.all("opened")[0]["address"] == f"private://{SHELL}"
        assert (await reporter.wait_for("left"))["reason"] == "finished"
        assert (relay.tunnel.served, relay.tunnel.ingresses[0].listeners) == (1, ())
    assert str(BOB.id) not in str(reporter.all("failed"))


async def test_a_visitor_that_is_not_admitted_is_refused_at_the_host(
    relay: RelayHere, keys: Path, reporter: RecordingReporter
) -> None:
    target = Target.parse(str(unused_port()))
    async with privately_exposed(target, relay.access, reporter, keys, "bob"):
        with pytest.raises(RefusedError, match=rf"shell@alice refused the visit: not admitted: {CAROL.id}") as refused:
            async with visiting(relay.access, CAROL):
                pass
        assert (refused.value.reply_code, refused.value.status) == ("not-allowed", 77)
        failed = await reporter.wait_for("failed")
        assert failed["reason"] == f"not admitted: {CAROL.id}; to let it in, add --admit {CAROL.id}"


async def test_a_peer_that_is_removed_gets_in_no_more(
    relay: RelayHere, keys: Path, reporter: RecordingReporter
) -> None:
    async with local_server(echo) as target, privately_exposed(target, relay.access, reporter, keys, "bob"):
        async with visiting(relay.access) as stream:
            assert await answer(stream, b"hello") == b"hello"
        TrustedPeers().remove("bob")
        with pytest.raises(RefusedError, match="not admitted"):
            async with visiting(relay.access):
                pass


async def test_any_trusted_peer_may_be_admitted(relay: RelayHere, keys: Path, reporter: RecordingReporter) -> None:
    async with local_server(echo) as target, privately_exposed(target, relay.access, reporter, keys, "any"):
        async with visiting(relay.access) as stream:
            assert await answer(stream, b"hello") == b"hello"
        with pytest.raises(RefusedError, match="not admitted"):
            async with visiting(relay.access, CAROL):
                pass


# What the relay decides


async def test_an_unknown_tunnel(relay: RelayHere, keys: Path) -> None:
    with pytest.raises(RefusedError, match=f"no private tunnel {SHELL} is open") as refused:
        async with visiting(relay.access):
            pass
    assert refused.value.reply_code == "no-such-tunnel"


async def test_the_limits_of_the_tunnel_hold(relay: RelayHere, keys: Path, reporter: RecordingReporter) -> None:
    async with (
        local_server(echo) as target,
        privately_exposed(target, relay.access, reporter, keys, "bob", max_visitors="1"),
        visiting(relay.access) as stream,
    ):
        await stream.send_all(b"here")
        assert await stream.receive_some() == b"here"
        with pytest.raises(
            RefusedError, match=r"could not visit .*1 visitors are connected \(max_visitors\)"
        ) as refused:
            async with visiting(relay.access):
                pass
        assert refused.value.reply_code == "limit"
        assert relay.tunnel.refusals.total() == 1


async def test_a_tunnel_whose_agent_is_away(relay: RelayHere, keys: Path) -> None:
    claim = PrivateClaim(ALICE.public_key(), ALICE.sign(claimed_text("", "shell")))
    async with tunneld.connect(relay.where) as client:
        await client.open_tunnel(persist=True, name="shell", private=str(claim), pairing_timeout=0.05)
        with pytest.raises(RefusedError, match="its agent must be connected") as refused:
            async with visiting(relay.access):
                pass
        assert refused.value.reply_code == "no-such-tunnel"


# A hostile relay


@pytest.fixture
async def middle(relay: RelayHere) -> AsyncIterator[Middle]:
    async with in_the_middle(relay) as running:
        yield running


async def test_what_passes_the_relay_cannot_be_read(
    relay: RelayHere, middle: Middle, keys: Path, reporter: RecordingReporter
) -> None:
    said = CANARY * 1000
    async with (
        local_server(reverse) as target,
        privately_exposed(target, relay.access, reporter, keys, "bob"),
        visiting(middle.access) as stream,
    ):
        assert await answer(stream, said) == said[::-1]
    for passed in (bytes(middle.up), bytes(middle.down)):
        assert len(passed) > len(said)
        assert CANARY[:6] not in passed
        assert CANARY[::-1][:6] not in passed


def flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def twice(data: bytes) -> bytes:
    return data + data


async def talk(stream: trio.abc.HalfCloseableStream) -> None:
    """Send and receive until one of them fails. Nothing arrives that was not sent."""
    while True:
        await stream.send_all(b"second")
        if not await stream.receive_some():
            return


@pytest.mark.parametrize(("direction", "change"), [("up", flipped), ("down", flipped), ("up", twice)])
async def test_what_is_changed_ends_in_a_reset_on_both_sides(
    relay: RelayHere, middle: Middle, keys: Path, reporter: RecordingReporter, change: object, direction: str
) -> None:
    got: list[bytes] = []

    async def serve(stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError):
            while True:
                data = await stream.receive_some()
                got.append(bytes(data))
                if not data:
                    return
                await stream.send_all(data)

    async with (
        local_server(serve) as target,
        privately_exposed(target, relay.access, reporter, keys, "bob"),
        visiting(middle.access) as stream,
    ):
        await stream.send_all(b"first")
        assert await stream.receive_some() == b"first"
        setattr(middle, f"change_{direction}", change)
        with pytest.raises(trio.BrokenResourceError):
            await talk(stream)
        left = await reporter.wait_for("left")
        assert "failed" in str(left["reason"])
    assert b"" not in got, "the local server took it for a complete stream"
    assert set(got) <= {b"first", b"second"}


async def test_a_missing_record_ends_in_a_reset(
    relay: RelayHere, middle: Middle, keys: Path, reporter: RecordingReporter
) -> None:
    async with (
        local_server(echo) as target,
        privately_exposed(target, relay.access, reporter, keys, "bob"),
        visiting(middle.access) as stream,
    ):
        await stream.send_all(b"first")
        assert await stream.receive_some() == b"first"
        passed = len(middle.up)
        middle.change_up = lambda _data: b""
        await stream.send_all(b"lost")
        while len(middle.up) == passed:
            await trio.lowlevel.checkpoint()
        middle.change_up = unchanged
        with pytest.raises(trio.BrokenResourceError):
            await answer(stream, b"next")


async def test_a_stream_that_is_cut_does_not_look_complete(
    relay: RelayHere, middle: Middle, keys: Path, reporter: RecordingReporter
) -> None:
    async with (
        local_server(echo) as target,
        privately_exposed(target, relay.access, reporter, keys, "bob"),
        visiting(middle.access) as stream,
    ):
        await stream.send_all(b"hello")
        assert await stream.receive_some() == b"hello"
        middle.is_cut = True  # with an end of file that no TLS announced
        with pytest.raises(trio.BrokenResourceError):
            await answer(stream, b"more")
        assert (await reporter.wait_for("left"))["reason"] != "finished"


async def test_a_recorded_visit_cannot_be_replayed(
    relay: RelayHere, middle: Middle, keys: Path, reporter: RecordingReporter
) -> None:
    served = 0

    async def serve(stream: trio.SocketStream) -> None:
        nonlocal served
        served += 1
        await echo(stream)

    async with local_server(serve) as target, privately_exposed(target, relay.access, reporter, keys, "bob"):
        async with visiting(middle.access) as stream:
            assert await answer(stream, b"rm -r ~\n") == b"rm -r ~\n"
        recorded = bytes(middle.up)
        again = await trio.open_tcp_stream("127.0.0.1", relay.port)
        async with again:
            await again.send_all(recorded)
            with suppress(trio.BrokenResourceError):
                while await again.receive_some():
                    pass
        failed = await reporter.wait_for("failed")
        assert "TLS handshake failed" in str(failed["reason"])
    assert served == 1


async def test_the_relay_cannot_lead_a_visitor_to_another_node(
    relay: RelayHere, middle: Middle, keys: Path, reporter: RecordingReporter
) -> None:
    theirs = RecordingReporter()
    async with (
        local_server(echo) as target,
        privately_exposed(target, relay.access, reporter, keys, "bob"),
        privately_exposed(target, relay.access, theirs, keys, "bob", owner="carol"),
    ):
        middle.change_up = lambda data: data.replace(str(ALICE.id).encode(), str(CAROL.id).encode())
        with pytest.raises(RemoteProtocolError, match=rf"this is not shell@alice: its id is {CAROL.id}"):
            async with visiting(middle.access):
                pass
        certificate = {CAROL.certificate: ALICE.certificate}
        middle.change_down = lambda data: data.replace(*next(iter(certificate.items())))
        with pytest.raises(RemoteProtocolError, match="handshake with shell@alice failed"):
            async with visiting(middle.access):
                pass
        assert "TLS handshake failed" in str((await theirs.wait_for("failed", 2))["reason"])
    assert not theirs.all("visitor")


async def test_the_relay_cannot_lead_a_visitor_to_another_tunnel_of_the_same_node(
    relay: RelayHere, middle: Middle, keys: Path, reporter: RecordingReporter
) -> None:
    other = RecordingReporter()
    async with (
        local_server(echo) as target,
        privately_exposed(target, relay.access, reporter, keys, "bob"),
        privately_exposed(target, relay.access, other, keys, "bob", name="admin"),
    ):
        middle.change_up = lambda data: data.replace(b"shell@", b"admin@")
        with pytest.raises(RemoteProtocolError, match=r"another tunnel than shell@alice|handshake"):
            async with visiting(middle.access):
                pass
        assert "another tunnel" in str((await other.wait_for("failed"))["reason"])
    assert not other.all("visitor")


async def test_a_visitor_with_the_certificate_of_another_is_refused(
    relay: RelayHere, keys: Path, reporter: RecordingReporter
) -> None:
    """Certificates are no secret: the relay has seen bob's."""
    thief = replace(CAROL, certificate=BOB.certificate)
    async with local_server(echo) as target, privately_exposed(target, relay.access, reporter, keys, "bob"):
        with suppress(RemoteProtocolError, trio.BrokenResourceError):
            async with visiting(relay.access, thief) as stream:
                await stream.receive_some()
        assert "not admitted: bob" in str((await reporter.wait_for("failed"))["reason"])
    assert not reporter.all("visitor")


# Invitations


def invited(relay: RelayHere, code: OneTimeCode, seconds: float = 60.0, name: str = "shell") -> VisitedTunnel:
    """What a visitor with this code asks for, after `tunnel invite`."""
    relay.service.privates.invite(SHELL, code.ticket, trio.current_time(), seconds)
    Invitations().add(name, code, seconds)
    return VisitedTunnel.invited(code)


async def test_a_code_lets_one_visitor_in_once(relay: RelayHere, keys: Path, reporter: RecordingReporter) -> None:
    async with local_server(echo) as target, privately_exposed(target, relay.access, reporter, keys):
        tunnel = invited(relay, OneTimeCode.create())
        async with visiting(relay.access, tunnel=tunnel) as stream:
            assert await answer(stream, b"hello") == b"hello"
        with pytest.raises(RefusedError, match="a code is good for one visit"):
            async with visiting(relay.access, tunnel=tunnel):
                pass
        assert reporter.all("admitted")[0]["peer"] == "a visitor with a one-time code"


async def test_of_two_visitors_with_one_code_one_gets_in(
    relay: RelayHere, keys: Path, reporter: RecordingReporter
) -> None:
    async with local_server(echo) as target, privately_exposed(target, relay.access, reporter, keys):
        tunnel, answers = invited(relay, OneTimeCode.create()), list[bytes]()

        async def visitor() -> None:
            with suppress(RefusedError, RemoteProtocolError, trio.BrokenResourceError):
                async with visiting(relay.access, tunnel=tunnel) as stream:
                    answers.append(await answer(stream, b"hello"))

        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(visitor)
        assert answers == [b"hello"]


@pytest.mark.parametrize("mistake", ["expired", "another tunnel", "no ticket", "another code"])
async def test_codes_that_let_nobody_in(
    relay: RelayHere, keys: Path, reporter: RecordingReporter, mistake: str
) -> None:
    code = OneTimeCode.create()
    async with local_server(echo) as target, privately_exposed(target, relay.access, reporter, keys):
        tunnel = invited(
            relay,
            code,
            seconds=-1.0 if mistake == "expired" else 60.0,
            name="other" if mistake == "another tunnel" else "shell",
        )
        if mistake == "no ticket":
            tunnel = replace(tunnel, asked_for=OneTimeCode.create().ticket)
        elif mistake == "another code":
            tunnel = replace(VisitedTunnel.invited(OneTimeCode.create()), asked_for=code.ticket)
        with pytest.raises(RefusedError) as refused:
            async with visiting(relay.access, tunnel=tunnel):
                pass
        assert refused.value.reply_code == "not-allowed"
    assert not reporter.all("visitor")


# The interface for programs


async def test_a_program_visits(relay: RelayHere, keys: Path, reporter: RecordingReporter) -> None:
    async with local_server(reverse) as target, privately_exposed(target, relay.access, reporter, keys, "bob"):
        async with tunneld.visit(relay.where, "shell@alice", identity=keys / "bob") as stream:
            assert await answer(stream, b"hello") == b"olleh"
        async with tunneld.visit(relay.where, f"shell@{ALICE.id}", identity=keys / "bob") as stream:
            await stream.send_all(b"unread")
        code = OneTimeCode.create()
        invited(relay, code)
        async with tunneld.visit(relay.where, str(code)) as stream:
            assert await answer(stream, b"hello") == b"olleh"
        assert [left["up"] for left in (await reporter.wait_for("left", 3), *reporter.all("left"))][1:] == [5, 6, 5]


# Roaming and restarts


async def _run_two_relays(port: int, end: trio.Event, begin: trio.Event, *, task_status: trio.TaskStatus[None]) -> None:
    """Two relays on the same control port: the first until `end`, the second from `begin` on."""
    async with relay_here(port):
        task_status.started()
        await end.wait()
    await begin.wait()
    async with relay_here(port):
        await trio.sleep_forever()


async def test_visits_go_on_when_the_relay_has_restarted(
    keys: Path, reporter: RecordingReporter, nursery: trio.Nursery
) -> None:
    end, begin, port = trio.Event(), trio.Event(), unused_port()
    await nursery.start(_run_two_relays, port, end, begin)
    with trio.fail_after(PATIENCE):
        async with local_server(echo) as target, privately_exposed(target, access_to(port), reporter, keys, "bob"):
            async with visiting(access_to(port)) as stream:
                assert await answer(stream, b"before") == b"before"
            end.set()
            await reporter.wait_for("reconnecting")
            begin.set()
            await reporter.wait_for("opened", 2)
            async with visiting(access_to(port)) as stream:
                assert await answer(stream, b"after") == b"after"
    nursery.cancel_scope.cancel()


async def test_another_key_cannot_have_the_address(relay: RelayHere, keys: Path, reporter: RecordingReporter) -> None:
    """On a relay without credentials, too, the address belongs to the holder of the key."""
    options = {"persist": "yes", "name": "shell"}
    async with local_server(echo) as target, privately_exposed(target, relay.access, reporter, keys, "bob"):
        claim = relay.tunnel.spec.options.private
        async with tunneld.connect(relay.where) as client:
            with pytest.raises(RefusedError, match="the signature in private= does not fit"):
                await client.open_tunnel(private=f"{claim}"[:-2] + "AA", **options)
            with pytest.raises(RefusedError, match="the signature in private= does not fit"):
                await client.open_tunnel(private=str(claim), persist=True, name="admin")
        async with visiting(relay.access) as stream:
            assert await answer(stream, b"hello") == b"hello"


def test_the_address_of_an_identity() -> None:
    assert str(Private(Identity.from_seed(bytes(range(32))).id, "shell")) == "shell@oFCDfYUHBYLM9zlLCYiEfMMSy4g"


def test_only_tls_that_ends_at_the_relay_may_be_left() -> None:
    """Not that of a proxy in front of it, which would take the close_notify for the end."""
    assert VisitAnswers(SHELL, may_leave=True).accepted == f"OK visiting {SHELL} {LEAVE_TLS}\n".encode()
    assert VisitAnswers(SHELL, may_leave=False).accepted == f"OK visiting {SHELL}\n".encode()
