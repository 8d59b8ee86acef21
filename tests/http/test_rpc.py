"""XML-RPC over real sockets: Python's own client, and malformed calls."""

from __future__ import annotations

import xmlrpc.client
from typing import Any
from xmlrpc.client import ServerProxy

import pytest
import structlog
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.http.support import HttpAnswer, HttpRelay, raising, running_http
from tests.support.peers import connect, is_dropped, read_exactly
from tunneld.control import describe
from tunneld.control.commands import COMMANDS
from tunneld.http.problems import FAULTS, INTERNAL
from tunneld.http.rpc import ANSWERS_WITH_ITEMS
from tunneld.net.endpoint import Endpoint


def fault_in(answer: HttpAnswer) -> tuple[int, str]:
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("text/xml")
    with pytest.raises(xmlrpc.client.Fault) as fault:
        xmlrpc.client.loads(answer.text)
    return fault.value.faultCode, fault.value.faultString


async def fault_of(relay: HttpRelay, method: str, *params: Any) -> tuple[int, str]:
    return fault_in(await relay.call_xml(xmlrpc.client.dumps(params, method)))


@pytest.mark.parametrize("path", ["", "/RPC2", "/"])
@pytest.mark.parametrize("prefix", ["tunnel.", ""])
async def test_bytes_cross_a_tunnel_that_the_stock_client_opened(path: str, prefix: str) -> None:
    def talk(proxy: ServerProxy) -> tuple[Any, Any]:
        uri = getattr(proxy, f"{prefix}openTunnel")()
        return uri, getattr(proxy, f"{prefix}getTunnelAddress")(uri)

    async with running_http() as relay:
        server_uri, client_uri = await relay.with_stock_client(talk, path)
        server = await connect(Endpoint.parse(server_uri))
        visitor = await connect(Endpoint.parse(client_uri))
        await server.send_all(b"SSH-2.0")
        assert await read_exactly(visitor, 7) == b"SSH-2.0"
        await visitor.aclose()
        assert await is_dropped(server)


async def test_a_call_in_http_1_0_without_host_is_answered() -> None:
    call = xmlrpc.client.dumps((), "tunnel.openTunnel").encode()
    head = f"POST /RPC2 HTTP/1.0\r\nContent-Type: text/xml\r\nContent-Length: {len(call)}\r\n\r\n".encode()
    async with running_http() as relay, await relay.connect() as stream:
        await stream.send_all(head + call)
        received = b"".join([chunk async for chunk in stream])
        assert b"tcp://127.0.0.1:" in received


async def test_options_are_a_struct_of_typed_values() -> None:
    def talk(proxy: Any) -> None:
        proxy.tunnel.openTunnel({"persist": True, "ttl": 60.5, "name": "one"})
        proxy.tunnel.openTunnel("tcp", {"persist": "no", "idle_timeout": 9, "name": "two"})

    async with running_http() as relay:
        await relay.with_stock_client(talk)
        one, two = (tunnel.spec for tunnel in relay.daemon.service.tunnels())
        assert (one.options.name, one.options.persist, one.options.ttl) == ("one", True, 60.5)
        assert (two.options.name, two.options.persist, two.options.idle_timeout) == ("two", False, 9.0)
        assert one.owner.startswith("http 127.0.0.1:")
        assert one.requester_host == "127.0.0.1"


async def test_lists_are_arrays_of_structs_and_other_verbs_return_text() -> None:
    def talk(proxy: Any) -> list[Any]:
        empty = proxy.tunnel.list()
        uri = proxy.tunnel.openTunnel({"persist": True})
        shown = proxy.tunnel.show(uri)
        listed = proxy.list()
        trimmed = proxy.trim("t1", 0)
        return [empty, shown == listed, listed[0]["server"] == uri, trimmed, proxy.drain("t1"), proxy.tunnel.list()]

    async with running_http() as relay:
        said = await relay.with_stock_client(talk)
        assert said[:3] == [[], True, True]
        assert said[3:] == ["closed 0 idle server connections of t1", "draining t1, 0 visitors left", []]


async def test_counters_beyond_32_bits_reach_the_stock_client() -> None:
    def talk(proxy: Any) -> Any:
        return proxy.tunnel.status()

    async with running_http() as relay:
        relay.daemon.facts = {"up": 5 * 2**32, "down": 3}
        (status,) = await relay.with_stock_client(talk)
        assert (status["up"], status["down"]) == (5 * 2**32, 3)


async def test_introspection() -> None:
    async with running_http() as relay:
        methods = await relay.with_stock_client(lambda proxy: proxy.system.listMethods())
        expected = {f"tunnel.{row.verb}" for row in COMMANDS.values()} - {"tunnel.auth", "tunnel.quit", "tunnel.watch"}
        assert set(methods) == expected  # type: ignore[arg-type]
        help_text = await relay.with_stock_client(lambda proxy: proxy.system.methodHelp("tunnel.close"))
        assert help_text == "close URI|ID [keep]: close a tunnel now; with keep, its address stays reserved"
        assert (await fault_of(relay, "system.shutdown"))[0] == FAULTS["usage"]


def test_every_verb_that_answers_with_items_is_in_the_table_of_commands() -> None:
    assert set(COMMANDS) >= ANSWERS_WITH_ITEMS


@pytest.mark.parametrize(
    ("method", "params", "code", "reason"),
    [
        ("tunnel.getTunnelAddress", ("tcp://127.0.0.1:1",), "no-such-tunnel", "no open tunnel has the server URI"),
        ("tunnel.getTunnelAddress", ("127.0.0.1:1",), "usage", "invalid URI"),
        ("tunnel.getTunnelAddress", (), "usage", "usage: getTunnelAddress URI"),
        ("tunnel.getTunnelAddress", (1, 2), "usage", "usage: getTunnelAddress URI"),
        ("tunnel.getTunnelAddress", (True,), "usage", "argument 1 is neither a string nor an integer"),
        ("tunnel.getTunnelAddress", (["tcp://127.0.0.1:1"],), "usage", "argument 1 is neither a string"),
        ("tunnel.getTunnelAddress", (b"x",), "usage", "argument 1 is neither a string"),
        ("tunnel.getTunnelAddress", ("x" * 5000,), "usage", "argument 1 of 5000 characters is longer than 4096"),
        ("tunnel.show", ("t\u0085",), "no-such-tunnel", "no open tunnel"),  # white space around a word is stripped
        ("tunnel.show", ("t\u00851",), "usage", "argument 1 contains the character U+0085"),
        ("openTunnel", ("egg",), "usage", "unrecognized backend 'egg'"),
        ("openTunnel", ({"color": "red"},), "usage", "unrecognized option 'color'"),
        ("openTunnel", ({"ttl": -1},), "usage", "option ttl='-1'"),
        ("openTunnel", ({"ttl": [1]},), "usage", "option ttl is neither a string, a number nor a boolean"),
        ("openTunnel", ({"ttl": {}}, "tcp"), "usage", "argument 1 is neither a string nor an integer but a struct"),
        ("list", ({"ttl": 1},), "usage", "list does not accept ttl="),
        ("tunnel.sing", (), "usage", "unrecognized verb 'sing'"),
        ("tunnel.quit", (), "usage", "quit ends a connection of the control protocol"),
        ("tunnel.watch", (), "usage", "use GET /api/v1/watch"),
        ("other.list", (), "usage", "unrecognized verb 'other.list'"),
    ],
)
async def test_an_error_is_a_fault_with_its_wire_code(
    method: str, params: tuple[Any, ...], code: str, reason: str
) -> None:
    async with running_http() as relay:
        number, text = await fault_of(relay, method, *params)
        assert number == FAULTS[code]
        assert text.startswith(f"{code}: ")
        assert reason in text
        assert list(relay.daemon.service.tunnels()) == []


async def test_a_draining_relay_refuses_with_its_fault() -> None:
    async with running_http() as relay:
        relay.daemon.service.draining = True
        assert (await fault_of(relay, "openTunnel"))[0] == FAULTS["draining"] == 6


@pytest.mark.parametrize("body", ["", "<", "hello", "<methodCall/>", "<!DOCTYPE x><methodCall/>"])
async def test_a_malformed_call_is_a_fault(body: str) -> None:
    async with running_http() as relay:
        number, text = fault_in(await relay.call_xml(body))
        assert number == FAULTS["protocol"] == 9
        assert text.startswith("protocol: not an XML-RPC call: ")


@given(st.one_of(st.binary(max_size=200), st.text(alphabet="<>/&;!?[]abimnrst ", max_size=80).map(str.encode)))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_body_gets_an_answer_in_xml(body: bytes) -> None:
    async def main() -> None:
        async with running_http() as relay:
            answer = await relay.call_xml(body)
            assert answer.status == 200
            assert answer.body.startswith(b"<?xml")
            assert b"Traceback" not in answer.body

    trio.run(main)


async def test_a_bug_is_a_fault_without_details_and_is_logged_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(describe, "describe_tunnel", raising(RuntimeError("the secret")))
    async with running_http() as relay:
        await relay.with_stock_client(lambda proxy: proxy.openTunnel())
        with structlog.testing.capture_logs() as logs:
            answer = await relay.call_xml(xmlrpc.client.dumps((), "list"))
        assert fault_in(answer) == (FAULTS["internal"], f"internal: {INTERNAL}")
        (entry,) = [entry for entry in logs if entry["log_level"] == "error"]
        assert isinstance(entry["exc_info"], RuntimeError)
