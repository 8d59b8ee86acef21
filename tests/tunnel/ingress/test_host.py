"""Host names of tunnels on the shared ports: with ports, replaced, drained, closed, and handed over."""

from __future__ import annotations

import ssl

import pytest
import trio
from trio.testing import MockClock

from tests.support.host_names import DOMAIN, PEER, NamedRelay, response, serve, start_named_relay
from tests.support.peers import connect, is_refused, read_all, read_exactly
from tests.support.visitors import until_parked, until_waiting
from tunneld.engine.engine import Engine
from tunneld.errors import LimitReachedError, UsageError
from tunneld.net.address import HostName, Port
from tunneld.net.endpoint import Endpoint
from tunneld.policy.access import Grant
from tunneld.tunnel.ingress.host import HostIngress
from tunneld.tunnel.tunnel import Phase

BLOG = f"blog.{DOMAIN}"
HEAD = b"GET / HTTP/1.1\r\nHost: blog.t.example.org\r\n\r\n"


@pytest.fixture
async def relay(nursery: trio.Nursery, engine: Engine) -> NamedRelay:
    return await start_named_relay(nursery, engine)


async def test_a_tunnel_serves_the_visitors_of_its_names_and_of_its_port(
    relay: NamedRelay, nursery: trio.Nursery
) -> None:
    port = (await relay.open()).client_uri.port
    await relay.service.close("t1")
    tunnel = await relay.open(host="blog,shop", client_port=str(port))
    assert tunnel.addresses == (HostName(BLOG), HostName(f"shop.{DOMAIN}"), Port(port))
    assert str(tunnel.client_uri) == f"http://{BLOG}/"
    nursery.start_soon(serve, tunnel, b"mine")
    assert await relay.get(BLOG) == (200, b"mine")
    assert await relay.get(f"shop.{DOMAIN}") == (200, b"mine")
    by_port = await connect(Endpoint("tcp", "127.0.0.1", port))
    await by_port.send_all(HEAD)
    assert (await read_exactly(by_port, 15)) == b"HTTP/1.1 200 OK"
    assert (await relay.get(f"other.{DOMAIN}"))[0] == 404


async def test_a_name_keeps_nothing_of_visitors_that_have_left(relay: NamedRelay, nursery: trio.Nursery) -> None:
    tunnel = await relay.open(host="blog")
    nursery.start_soon(serve, tunnel, b"mine")
    site = relay.names.sites.get(HostName(BLOG))
    assert isinstance(site, HostIngress)
    for _ in range(3):
        visitor = relay.connect()
        assert await relay.get(BLOG, visitor=visitor) == (200, b"mine")
        await visitor.aclose()
    await trio.testing.wait_all_tasks_blocked()
    assert not site._streams


async def test_what_fails_leaves_no_name_behind(relay: NamedRelay) -> None:
    await relay.open(host="blog")
    with pytest.raises(LimitReachedError, match=r"blog\.t\.example\.org is in use by another tunnel"):
        await relay.open(host="shop,blog")
    assert [str(name) for name, _ in relay.names.sites] == [BLOG]
    assert len(relay.service.tunnels()) == 1


async def test_no_request_fails_while_a_tunnel_is_replaced(relay: NamedRelay, nursery: trio.Nursery) -> None:
    first = await relay.open(name="web", host="blog")
    nursery.start_soon(serve, first, b"first")
    answers: list[tuple[int, bytes]] = []

    async def visit() -> None:
        while not answers or answers[-1] != (200, b"second"):
            answers.append(await relay.get(BLOG))

    kept = relay.connect()
    assert await relay.get(BLOG, visitor=kept) == (200, b"first")
    async with trio.open_nursery() as visitors:
        visitors.start_soon(visit)
        while len(answers) < 3:
            await trio.lowlevel.checkpoint()
        second = await relay.open(name="web", host="blog")
        assert first.phase is Phase.CLOSED
        visitors.start_soon(serve, second, b"second")
        while answers[-1] != (200, b"second"):
            await trio.lowlevel.checkpoint()
        assert await relay.get(BLOG, visitor=kept) == (200, b"second")  # on a connection from before
        visitors.cancel_scope.cancel()
    assert set(answers) == {(200, b"first"), (200, b"second")}


async def test_a_tunnel_that_gets_other_names_gives_up_the_ones_before(relay: NamedRelay) -> None:
    await relay.open(name="web", host="blog,shop")
    await relay.open(name="web", host="shop,news")
    assert sorted(str(name) for name, _ in relay.names.sites) == [f"news.{DOMAIN}", f"shop.{DOMAIN}"]


async def test_a_draining_tunnel_finishes_its_request_and_gets_no_other(
    relay: NamedRelay, nursery: trio.Nursery
) -> None:
    tunnel = await relay.open(host="blog")
    server = await connect(tunnel.server_uri)
    await until_parked(tunnel, 1)
    visitor = relay.connect()
    await visitor.send_all(HEAD)
    assert (await read_exactly(server, 14)) == b"GET / HTTP/1.1"
    waiting = relay.connect()
    await waiting.send_all(HEAD)
    await until_waiting(tunnel, 1)
    tunnel.drain()
    assert (await waiting.receive_some()).startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
    assert (await relay.get(BLOG))[0] == 404
    await server.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
    await server.aclose()
    answer = b""
    while not answer.endswith(b"ok"):
        answer += await visitor.receive_some()
    await tunnel.wait_closed()
    assert not list(relay.names.sites)


async def test_a_closed_tunnel_cuts_its_requests_and_keeps_its_visitors_connections(relay: NamedRelay) -> None:
    tunnel = await relay.open(host="blog")
    server = await connect(tunnel.server_uri)
    await until_parked(tunnel, 1)
    visitor = relay.connect()
    await visitor.send_all(HEAD)
    await read_exactly(server, 14)
    await relay.service.close(tunnel.id)
    assert (await visitor.receive_some()).startswith(b"HTTP/1.1 502 Bad Gateway\r\n")
    assert (await relay.get(BLOG, visitor=visitor))[0] == 404
    with pytest.raises(trio.BrokenResourceError):
        await read_all(server)
    assert await is_refused(tunnel.server_uri)


# TLS that ends at the hidden server


def hello(name: str) -> bytes:
    """The first message of a TLS client."""
    outgoing = ssl.MemoryBIO()
    client = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


async def test_a_tls_connection_is_passed_on_as_it_is_behind_a_proxy_header(relay: NamedRelay) -> None:
    tunnel = await relay.open(host="blog", tls="pass", proxy_protocol="v1")
    assert str(tunnel.client_uri) == f"https://{BLOG}/"
    visitor, first = relay.connect_tls(), hello(BLOG)
    await visitor.send_all(first[:100])
    await visitor.send_all(first[100:])
    server = await connect(tunnel.server_uri)
    header = b"PROXY TCP4 %b 127.0.0.1 %d " % (PEER[0].encode(), PEER[1])
    assert (await read_exactly(server, len(header))) == header
    while not (await server.receive_some(1)).endswith(b"\n"):
        pass
    assert await read_exactly(server, len(first)) == first
    await visitor.send_eof()
    assert await server.receive_some() == b""
    await server.send_all(b"an answer behind the end of file")
    await server.aclose()
    assert await read_all(visitor) == b"an answer behind the end of file"


async def test_a_tls_connection_waits_for_the_agent_and_then_closes(
    relay: NamedRelay, autojump_clock: MockClock
) -> None:
    tunnel = await relay.open(host="blog", tls="pass", pairing_timeout="7")
    visitor, began = relay.connect_tls(), trio.current_time()
    await visitor.send_all(hello(BLOG))
    with pytest.raises(trio.BrokenResourceError):
        await visitor.receive_some()
    assert trio.current_time() - began == pytest.approx(7, abs=0.2)
    assert tunnel.waiting == 0


async def test_a_name_that_keeps_its_tls_is_not_served_without(relay: NamedRelay) -> None:
    await relay.open(host="blog", tls="pass")
    visitor = relay.connect()
    await visitor.send_all(HEAD)
    assert b"Location: https://blog.t.example.org/\r\n" in await visitor.receive_some()


async def test_tls_is_not_passed_on_where_there_is_no_port_for_it(relay: NamedRelay) -> None:
    relay.names.set_port("https", 0)
    with pytest.raises(UsageError, match=r"names\.https"):
        await relay.open(tls="pass", host="blog")


async def test_a_name_that_is_kept_for_an_absent_agent_is_unavailable_and_no_wildcard_gets_it(
    relay: NamedRelay, nursery: trio.Nursery
) -> None:
    tunnel = await relay.open(name="web", host="blog")
    operator = Grant("operator", names=("*.t.example.org",))
    everything = await relay.open(operator, host="*")
    nursery.start_soon(serve, everything, b"wildcard")
    await relay.service.close(tunnel.id, keep=True)
    assert (await relay.get(BLOG))[0] == 503
    assert await relay.get(f"other.{DOMAIN}") == (200, b"wildcard")


async def test_idle_connections_of_visitors_do_not_hold_up_a_draining_tunnel(
    relay: NamedRelay, nursery: trio.Nursery
) -> None:
    tunnel = await relay.open(host="blog")
    nursery.start_soon(serve, tunnel, b"mine")
    idle, busy = relay.connect(), relay.connect()
    for visitor in (idle, busy):
        assert await relay.get(BLOG, visitor=visitor) == (200, b"mine")
    await busy.send_all(HEAD[:-2])  # not complete yet
    assert len(tunnel.visitors) == 2
    tunnel.drain()
    await tunnel.wait_closed()
    await busy.send_all(HEAD[-2:])
    assert (await response(busy))[0] == 404
    assert (await relay.get(BLOG, visitor=idle))[0] == 404


async def test_idle_connections_of_visitors_do_not_hold_up_an_agent_that_leaves(
    relay: NamedRelay, nursery: trio.Nursery
) -> None:
    tunnel = await relay.open(name="web", share="yes", host="blog")
    visitor = relay.connect()
    tunnel.agents.join("near", "127.0.0.1", None)
    for text in (b"first", b"second"):
        tunnel.agents.join("far", "127.0.0.2", None)
        server = await connect(tunnel.server_uri)
        await until_parked(tunnel, 1)
        await visitor.send_all(HEAD)
        await read_exactly(server, 14)
        await server.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(text), text))
        assert await response(visitor) == (200, text)
        assert not tunnel.dismiss("far")
        await read_all(server)
        await server.aclose()


async def test_a_response_under_way_is_the_last_one_of_a_draining_tunnel(relay: NamedRelay) -> None:
    tunnel = await relay.open(host="blog")
    server = await connect(tunnel.server_uri)
    await until_parked(tunnel, 1)
    visitor = relay.connect()
    await visitor.send_all(HEAD)
    await read_exactly(server, 14)
    await server.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\no")
    tunnel.drain()
    await server.send_all(b"k")
    assert await response(visitor) == (200, b"ok")
    await read_all(server)  # the relay ends the connection
    await server.aclose()
    await tunnel.wait_closed()
    assert (await relay.get(BLOG, visitor=visitor))[0] == 404


async def test_a_relay_that_drains_answers_503_to_all_names(relay: NamedRelay) -> None:
    await relay.open(host="blog")
    relay.service.draining = True
    for name in (BLOG, f"other.{DOMAIN}"):
        assert (await relay.get(name))[0] == 503


async def test_idle_connections_are_closed_in_order_when_the_relay_ends(engine: Engine) -> None:
    async with trio.open_nursery() as inner:
        relay = await start_named_relay(inner, engine)
        idle, busy = relay.connect(), relay.connect()
        assert (await relay.get(BLOG, visitor=idle))[0] == 404
        await busy.send_all(HEAD[:-2])
        await trio.testing.wait_all_tasks_blocked()
        inner.cancel_scope.cancel()
    assert await idle.receive_some() == b""
    with pytest.raises(trio.BrokenResourceError):
        await busy.receive_some()
