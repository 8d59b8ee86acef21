"""The client library against a real control server."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio
from trio.testing import MockClock, memory_stream_pair, wait_all_tasks_blocked

from tests.support.control import EVENTS, running_server
from tests.support.peers import PATIENCE
from tests.support.scripted_relays import GREETING, LONG, client_of, fake_relay, jump_when_idle, saying, stay
from tunneld.client import Client, connect
from tunneld.client.exchange import MAX_UNANSWERED, ControlExchange
from tunneld.errors import LocalProtocolError, RefusedError, RelayUnreachableError, UsageError
from tunneld.wire.lines import ControlRequest


async def test_a_call_returns_text_and_items() -> None:
    async with running_server() as server, client_of(server) as client:
        answer = await client.call("list", "2")
        assert (answer.text, answer.items) == ("2 tunnels", [{"id": "t0", "name": "a b"}, {"id": "t1", "name": "a b"}])


async def test_it_has_the_addresses_of_both_ends() -> None:
    async with running_server() as server, client_of(server) as client:
        assert (client.relay, client.relay_host, client.local_host) == (server.endpoint, "127.0.0.1", "127.0.0.1")
        assert client.version


@pytest.mark.parametrize(
    ("act", "request_"),
    [
        (lambda client: client.open_tunnel(), ControlRequest("opentunnel", ("tcp",))),
        (
            lambda client: client.open_tunnel("tcp", persist=True, name="my server", ttl=60, idle_timeout=None),
            ControlRequest("opentunnel", ("tcp",), {"persist": "yes", "name": "my server", "ttl": "60"}),
        ),
        (lambda client: client.get_tunnel_address("tcp://h:1"), ControlRequest("gettunneladdress", ("tcp://h:1",))),
        (lambda client: client.close("t1"), ControlRequest("close", ("t1",))),
        (lambda client: client.drain("t1"), ControlRequest("drain", ("t1",))),
        (lambda client: client.list(), ControlRequest("list")),
        (lambda client: client.status(), ControlRequest("status")),
        (lambda client: client.call("shutdown", "drain"), ControlRequest("shutdown", ("drain",))),
    ],
)
async def test_each_method_sends_its_verb(act: Callable[[Client], Awaitable[object]], request_: ControlRequest) -> None:
    async with running_server() as server, client_of(server) as client:
        await act(client)
        assert server.script.requests == [request_]


@pytest.mark.parametrize("greeting", [GREETING, GREETING.replace(b"auth", b"opens=described auth")])
async def test_a_tunnel_is_opened_and_described_in_one_request_if_the_relay_can(greeting: bytes) -> None:
    received: list[bytes] = []

    async def serve(stream: trio.SocketStream) -> None:
        await stream.send_all(greeting)
        buffer = b""
        while data := await stream.receive_some(1000):
            buffer += data
            while b"\n" in buffer:
                line, _, buffer = buffer.partition(b"\n")
                received.append(line)
                described = b"show" in line or b"described" in line
                await stream.send_all((b"* client=tcp://h:2 id=t1\n" if described else b"") + b"OK tcp://h:1\n")

    async with fake_relay(serve) as endpoint, connect(str(endpoint)) as client:
        record = await client.open_described("tcp", persist=True)
    assert (record["id"], record["client"]) == ("t1", "tcp://h:2")
    if b"described" in greeting:
        assert received == [b"openTunnel tcp described persist=yes"]
        assert record["server"] == "tcp://h:1"
    else:
        assert received == [b"openTunnel tcp persist=yes", b"show tcp://h:1"]


async def test_a_refusal_has_the_relays_code_and_the_client_stays_usable() -> None:
    async with running_server() as server, client_of(server) as client:
        with pytest.raises(RefusedError, match="no tunnel t9") as refused:
            await client.show("t9")
        assert refused.value.reply_code == "no-such-tunnel"
        assert (await client.call("echo", "on")).text == "on"


async def test_what_a_request_cannot_carry_is_not_sent() -> None:
    async with running_server() as server, client_of(server) as client:
        with pytest.raises(UsageError):
            await client.close("a\nb")
        assert (await client.call("echo", "on")).text == "on"


async def test_each_of_many_tasks_gets_its_own_answer() -> None:
    async with running_server() as server, client_of(server) as client:
        answers: dict[str, str] = {}

        async def ask(word: str) -> None:
            answers[word] = (await client.call("echo", word)).text

        async with trio.open_nursery() as nursery:
            for number in range(50):
                nursery.start_soon(ask, f"word{number}")
        assert all(word == text for word, text in answers.items())
        assert len(answers) == 50


class CountingRelay:
    """A relay that answers only when `may_answer` is set, and counts the requests that have arrived."""

    def __init__(self) -> None:
        self.arrived: list[bytes] = []
        self.changed = trio.Event()
        self.may_answer = trio.Event()

    async def serve(self, stream: trio.SocketStream) -> None:
        await stream.send_all(GREETING)
        answered = 0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._receive, stream)
            await self.may_answer.wait()
            while True:
                while answered < len(self.arrived):
                    word = self.arrived[answered].split()[1]
                    answered += 1
                    await stream.send_all(b"OK " + word + b"\n")
                await self.changed.wait()

    async def _receive(self, stream: trio.SocketStream) -> None:
        held = b""
        async for data in stream:
            *lines, held = (held + data).split(b"\n")
            self.arrived += lines
            self.changed.set()
            self.changed = trio.Event()

    async def until_arrived(self, count: int) -> None:
        while len(self.arrived) < count:
            await self.changed.wait()


async def test_requests_of_many_tasks_are_on_their_way_at_once_up_to_a_limit() -> None:
    relay, answers = CountingRelay(), dict[str, str]()

    async def ask(client: Client, word: str) -> None:
        answers[word] = (await client.call("echo", word)).text

    async with fake_relay(relay.serve) as address, connect(str(address)) as client, trio.open_nursery() as nursery:
        for number in range(2 * MAX_UNANSWERED):
            nursery.start_soon(ask, client, f"word{number}")
        await relay.until_arrived(MAX_UNANSWERED)
        await wait_all_tasks_blocked(0.01)
        assert len(relay.arrived) == MAX_UNANSWERED
        relay.may_answer.set()
    assert len(answers) == 2 * MAX_UNANSWERED
    assert all(word == text for word, text in answers.items())


async def test_a_call_whose_reader_is_cancelled_still_gets_its_answer() -> None:
    """The task that reads for all the others ends before its own answer arrives."""
    relay, answers = CountingRelay(), list[str]()

    async def ask(client: Client) -> None:
        answers.append((await client.call("echo", "mine")).text)

    async with fake_relay(relay.serve) as address, connect(str(address)) as client, trio.open_nursery() as nursery:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as readers:
                readers.start_soon(client.call, "echo", "abandoned")
                await relay.until_arrived(1)
                nursery.start_soon(ask, client)
                await relay.until_arrived(2)
                scope.cancel()
        relay.may_answer.set()
    assert answers == ["mine"]


async def test_a_connection_that_is_given_up_ends_every_call_with_the_reason() -> None:
    relay, reasons = CountingRelay(), list[str]()

    async def ask(client: Client) -> None:
        with pytest.raises(RelayUnreachableError) as failed:
            await client.call("echo", "x")
        reasons.append(str(failed.value))

    async with fake_relay(relay.serve) as address, connect(str(address)) as client:
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(ask, client)
            await relay.until_arrived(3)
            client.give_up("the address is gone")
        assert not client.answering
        assert await client.wait_lost() == reasons[0]
        assert reasons == [f"connection to relay {address} lost: the address is gone"] * 3


async def abandon(call: Callable[[], Awaitable[object]]) -> None:
    """Send a request, and cancel the call before its answer."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(call)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()


async def test_the_answer_to_an_abandoned_call_is_discarded() -> None:
    async def answer_late(stream: trio.SocketStream) -> None:
        requests = b""
        while requests.count(b"\n") < 4:
            requests += await stream.receive_some(1000)
        await stream.send_all(b"* id=t1\nOK abandoned\n" * 3 + b"* id=t2\nOK mine\n")
        await stay(stream)

    async with fake_relay(saying(GREETING, then=answer_late)) as relay, connect(str(relay)) as client:
        for _ in range(3):
            await abandon(client.list)
        answer = await client.call("echo")
        assert (answer.text, answer.items) == ("mine", [{"id": "t2"}])


async def test_a_watch_does_not_take_the_answer_to_an_abandoned_call_for_an_event() -> None:
    async def answer_late(stream: trio.SocketStream) -> None:
        requests = b""
        while requests.count(b"\n") < 2:
            requests += await stream.receive_some(1000)
        await stream.send_all(b"* id=t1\nOK abandoned\n* event=watching\n")
        await stay(stream)

    async with fake_relay(saying(GREETING, then=answer_late)) as relay, connect(str(relay)) as client:
        await abandon(client.list)
        async with client.watch() as events:
            assert await anext(events) == {"event": "watching"}


async def test_waiting_for_the_loss_delays_no_call() -> None:
    async with running_server() as server, client_of(server) as client, trio.open_nursery() as nursery:
        nursery.start_soon(client.wait_lost)
        answers: list[str] = []

        async def ask(word: str) -> None:
            answers.extend([(await client.call("echo", word)).text for _ in range(3)])

        async with trio.open_nursery() as callers:
            for word in ("one", "two", "three"):
                callers.start_soon(ask, word)
        await wait_all_tasks_blocked()
        assert sorted(answers) == ["one"] * 3 + ["three"] * 3 + ["two"] * 3
        async with client.watch():
            await wait_all_tasks_blocked()
        assert (await client.call("echo", "after")).text == "after"
        nursery.cancel_scope.cancel()


async def test_the_answer_to_an_abandoned_call_is_no_loss() -> None:
    may_answer, answered = trio.Event(), trio.Event()

    async def answer_late(stream: trio.SocketStream) -> None:
        await stream.receive_some(1000)
        await may_answer.wait()
        await stream.send_all(b"* id=t1\nOK abandoned\n")
        answered.set()
        await stream.receive_some(1000)
        await stream.send_all(b"OK mine\n")
        await stay(stream)

    async with fake_relay(saying(GREETING, then=answer_late)) as relay, connect(str(relay)) as client:
        await abandon(client.list)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.wait_lost)
            may_answer.set()
            await answered.wait()
            await wait_all_tasks_blocked()
            assert (await client.call("echo")).text == "mine"
            nursery.cancel_scope.cancel()


class SlowSender(trio.abc.SendStream):
    """Sends byte by byte, each after a checkpoint."""

    def __init__(self) -> None:
        self.sent = b""

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        for byte in bytes(data):
            await trio.lowlevel.checkpoint()
            self.sent += bytes([byte])

    async def wait_send_all_might_not_block(self) -> None: ...

    async def aclose(self) -> None: ...


async def test_a_call_that_is_cancelled_while_it_is_sent_is_sent_whole() -> None:
    sender = SlowSender()
    never = memory_stream_pair()[0]
    exchange = ControlExchange("tcp://relay:7010", trio.StapledStream(sender, never), PATIENCE)
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(exchange.request, ControlRequest("list"))
            while not sender.sent:
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
        assert sender.sent == b"list\n"


async def test_a_slow_answer_is_given_up_and_discarded_when_it_arrives(mock_clock: MockClock) -> None:
    async def slow(stream: trio.SocketStream) -> None:
        await stream.receive_some(1000)
        await trio.sleep(60)
        await stream.send_all(b"* late=1\nOK late\nOK in time\n")
        await stay(stream)

    async with fake_relay(saying(GREETING, then=slow), LONG) as relay, connect(str(relay), timeout=10.0) as client:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(jump_when_idle, mock_clock, 11)
            with pytest.raises(RelayUnreachableError, match=r"relay tcp://.* did not answer list in 10 s"):
                await client.list()
        client.timeout = 100.0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(jump_when_idle, mock_clock, 60)
            answer = await client.call("echo")
        assert (answer.text, answer.items) == ("in time", [])


async def test_a_watch_yields_events_until_it_is_left() -> None:
    async with running_server() as server, client_of(server) as client:
        async with client.watch() as events:
            assert [await anext(events) for _ in range(3)] == [{"event": "watching"}, *EVENTS]
        await wait_all_tasks_blocked(0.005)
        assert server.script.streams_closed == 1
        assert (await client.call("echo", "on")).text == "on"


async def test_a_watch_of_one_tunnel_names_it() -> None:
    async with running_server() as server, client_of(server) as client:
        async with client.watch("t1"):
            pass
        await client.call("echo")
        assert server.script.requests[0] == ControlRequest("watch", ("t1",))


async def test_a_watch_that_the_relay_ends_is_over() -> None:
    async with running_server() as server, client_of(server) as client:
        async with client.watch("once") as events:
            assert len([event async for event in events]) == 3
            assert [event async for event in events] == []
        assert (await client.call("echo", "on")).text == "on"


async def test_a_watch_that_is_cancelled_leaves_the_client_usable() -> None:
    async with running_server() as server, client_of(server) as client:
        with trio.CancelScope() as scope:
            async with client.watch() as events:
                async for _ in events:
                    scope.cancel()
        assert scope.cancelled_caught
        assert (await client.call("echo", "on")).text == "on"


async def test_the_iteration_of_a_refused_watch_raises() -> None:
    async def refuse(stream: trio.SocketStream) -> None:
        await stream.receive_some(1000)
        await stream.send_all(b"ERR no-such-tunnel no tunnel t9\nOK on\n")
        await stay(stream)

    async with fake_relay(saying(GREETING, then=refuse)) as relay, connect(str(relay)) as client:
        async with client.watch("t9") as events:
            with pytest.raises(RefusedError, match="no tunnel t9"):
                await anext(events)
        assert (await client.call("echo")).text == "on"


async def test_calls_during_a_watch_are_refused_here() -> None:
    async with running_server() as server, client_of(server) as client, client.watch():
        with pytest.raises(LocalProtocolError, match="is watching events; use another client for calls"):
            await client.list()
