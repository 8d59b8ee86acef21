"""The client library against relays that are down, not a relay, lost, or set up for TLS in another way."""

from __future__ import annotations

import re
import ssl
from datetime import UTC, datetime, timedelta

import pytest
import trio
import trustme
from trio.testing import MockClock

from tests.support.control import running_server
from tests.support.peers import reset
from tests.support.scripted_relays import GREETING, LONG, client_of, fake_relay, jump_when_idle, saying, stay
from tunneld.client import connect, exchange
from tunneld.client.exchange import why
from tunneld.config.schema import ControlSettings
from tunneld.errors import RefusedError, RelayUnreachableError, RemoteProtocolError, UsageError
from tunneld.tls.connection import PEER_CLOSED
from tunneld.wire.lines import MAX_REPLY_LINE


@pytest.mark.parametrize("relay", ["", "no host", "h:0", "http://h:1", "tcp://", "h:99999"])
async def test_an_invalid_relay_address_is_refused(relay: str) -> None:
    with pytest.raises(UsageError):
        async with connect(relay):
            pass


async def test_a_relay_that_is_down_is_named() -> None:
    async with running_server() as server:
        relay = server.endpoint
    with pytest.raises(RelayUnreachableError, match=rf"^could not reach relay {relay}: connection refused$"):
        async with connect(relay.authority):
            pass


async def test_a_name_that_does_not_exist_is_named() -> None:
    with pytest.raises(RelayUnreachableError, match=r"^could not reach relay tcp://nosuch\.invalid:7010: "):
        async with connect("nosuch.invalid:7010"):
            pass


@pytest.mark.parametrize(
    ("greeting", "message"),
    [
        (
            b"SSH-2.0-OpenSSH_9.2\r\n",
            "broke the control protocol: not a reply of the control protocol: 'SSH-2.0-OpenSSH_9.2'",
        ),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "check the address: it must be a relay's control port"),
        (b"OK hello\n", "is not a tunneld relay: its greeting is 'hello'; check the address"),
        (b"OK\n", "is not a tunneld relay: its greeting is ''"),
        (
            b"OK tunneld 2.0 protocol=2 auth=none\n",
            "speaks version '2' of the control protocol, this program version '1'; update the older one",
        ),
        (b"\x15\x03\x01\x00\x02\x02\x46\n", "check the address: it must be a relay's control port"),
        (b"x" * (MAX_REPLY_LINE + 2), "line is longer than"),
    ],
)
async def test_a_peer_that_is_no_relay_is_recognized(greeting: bytes, message: str) -> None:
    async with fake_relay(saying(greeting, then=stay)) as relay:
        with pytest.raises(RemoteProtocolError) as failed:
            async with connect(str(relay)):
                pass
        assert message in str(failed.value)
        assert str(relay) in str(failed.value)


async def test_a_full_relay_refuses() -> None:
    async with running_server(ControlSettings(max_connections=1)) as server, client_of(server):
        with pytest.raises(RefusedError, match="1 control connections are open") as refused:
            async with client_of(server):
                pass
        assert refused.value.reply_code == "limit"


async def test_a_relay_that_sends_no_greeting_is_given_up(mock_clock: MockClock) -> None:
    async with fake_relay(stay, LONG) as relay, trio.open_nursery() as nursery:
        nursery.start_soon(jump_when_idle, mock_clock, 11)
        with pytest.raises(RelayUnreachableError, match=rf"relay {relay} sent no greeting in 10 s; it may require TLS"):
            async with connect(str(relay)):
                pass


async def test_a_relay_that_closes_the_connection_stays_lost() -> None:
    async with fake_relay(saying(GREETING)) as relay, connect(str(relay)) as client:
        for _ in range(2):
            with pytest.raises(RelayUnreachableError, match=f"^connection to relay {relay} lost: "):
                await client.list()


@pytest.mark.parametrize(
    ("last", "reason"),
    [
        (b"", PEER_CLOSED),
        (
            b"ERR limit no request for 300 s (control.idle_timeout); connect again\n",
            "no request for 300 s (control.idle_timeout); connect again",
        ),
        (b"OK by the way\n", "unexpected reply"),
        (b"* what?\n", "not an item of key=value pairs"),
    ],
)
async def test_the_loss_is_noticed_without_a_call(last: bytes, reason: str) -> None:
    async with fake_relay(saying(GREETING, last)) as relay, connect(str(relay)) as client:
        await client.wait_lost()
        await client.wait_lost()
        with pytest.raises(RelayUnreachableError, match=f"^connection to relay {relay} lost: {re.escape(reason)}"):
            await client.list()


async def test_an_answer_that_never_ends_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "MAX_ITEMS", 3)

    async def send_items(stream: trio.SocketStream) -> None:
        await stream.receive_some(1000)
        await stream.send_all(b"* id=t1\n" * 4)
        await stay(stream)

    async with fake_relay(saying(GREETING, then=send_items)) as relay, connect(str(relay)) as client:
        with pytest.raises(RelayUnreachableError, match="answer of more than 3 items"):
            await client.list()


async def test_a_relay_that_resets_the_connection_during_a_watch_is_lost() -> None:
    async def reset_connection(stream: trio.SocketStream) -> None:
        await stream.receive_some(1000)
        reset(stream)

    async with fake_relay(saying(GREETING, then=reset_connection)) as relay:
        lost = f"connection to relay {relay} lost: "
        async with connect(str(relay)) as client, client.watch() as events:
            with pytest.raises(RelayUnreachableError, match=lost):
                await anext(events)


async def test_after_an_invalid_reply_the_connection_is_not_used_again() -> None:
    async def send_garbage(stream: trio.SocketStream) -> None:
        await stream.receive_some(1000)
        await stream.send_all(b"* what?\n")
        await stay(stream)

    async with fake_relay(saying(GREETING, then=send_garbage)) as relay, connect(str(relay)) as client:
        with pytest.raises(RemoteProtocolError, match=f"relay {relay} broke the control protocol: "):
            await client.list()
        with pytest.raises(RelayUnreachableError, match="lost: not an item of key=value pairs"):
            await client.list()


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def server_context(authority: trustme.CA, host: str = "127.0.0.1", *, mutual: bool = False) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(host).configure_cert(context)
    if mutual:
        authority.configure_trust(context)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def client_context(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


@pytest.mark.parametrize("form", ["tls://{}", "tcp://{}", "{}"])
async def test_with_a_context_it_uses_tls_whatever_the_uri_says(authority: trustme.CA, form: str) -> None:
    async with running_server(tls=server_context(authority)) as server:
        relay = form.format(server.endpoint.authority)
        async with connect(relay, tls=client_context(authority)) as client:
            assert (await client.call("echo", "hi")).text == "hi"
            assert client.relay.scheme == "tls"
            assert client.local_host == "127.0.0.1"


async def test_an_unknown_authority_is_reported_with_advice() -> None:
    other = trustme.CA()
    async with running_server(tls=server_context(other)) as server:
        with pytest.raises(
            RelayUnreachableError,
            match=r"TLS handshake with relay .* failed: certificate verification failed \(unable .*--pin .*--ca",
        ):
            async with connect(str(server.endpoint)):
                pass


async def test_an_expired_certificate_is_reported_with_the_time(authority: trustme.CA) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1", not_after=datetime(2020, 1, 1, tzinfo=UTC)).configure_cert(context)
    now = datetime.now(UTC).strftime("%Y-%m-%d")
    async with running_server(tls=context) as server:
        with pytest.raises(
            RelayUnreachableError,
            match=rf"\(certificate has expired\); it is {now} .* by this machine's clock",
        ):
            async with connect(str(server.endpoint), tls=client_context(authority)):
                pass


async def test_a_certificate_that_is_not_valid_yet_need_not_be_renewed(authority: trustme.CA) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    later = datetime.now(UTC) + timedelta(days=2)
    authority.issue_cert("127.0.0.1", not_before=later).configure_cert(context)
    async with running_server(tls=context) as server:
        with pytest.raises(
            RelayUnreachableError,
            match=r"\(certificate is not yet valid.*\); it is .* by this machine's clock; if that is wrong, correct it",
        ) as failed:
            async with connect(str(server.endpoint), tls=client_context(authority)):
                pass
    assert "renew" not in str(failed.value)


async def test_a_relay_that_closes_the_connection_in_the_handshake_may_block_the_address(authority: trustme.CA) -> None:
    async def close_connection(stream: trio.SocketStream) -> None:
        await stream.receive_some()

    async with fake_relay(close_connection) as relay:
        with pytest.raises(
            RelayUnreachableError,
            match="the relay closed the connection; after failed logins it blocks the address for a while",
        ):
            async with connect(f"tls://{relay.authority}", tls=client_context(authority)):
                pass


@pytest.mark.parametrize("reason", ["UNEXPECTED_EOF_WHILE_READING", None])
def test_a_closed_connection_is_recognized_whatever_python_calls_it(reason: str | None) -> None:
    error, cause = trio.BrokenResourceError(), ssl.SSLError() if reason else ssl.SSLEOFError()
    cause.reason = reason or ""
    error.__cause__ = cause
    assert why(error) == PEER_CLOSED


async def test_a_wrong_name_is_reported(authority: trustme.CA) -> None:
    async with running_server(tls=server_context(authority, "other.example.org")) as server:
        with pytest.raises(RelayUnreachableError, match="IP address mismatch"):
            async with connect(str(server.endpoint), tls=client_context(authority)):
                pass


async def test_a_relay_without_tls_is_reported(authority: trustme.CA) -> None:
    async with running_server() as server:
        with pytest.raises(RelayUnreachableError, match="the relay does not use TLS on this port; use tcp://"):
            async with connect(f"tls://{server.endpoint.authority}", tls=client_context(authority)):
                pass


async def test_a_relay_that_requires_a_certificate_is_reported(authority: trustme.CA) -> None:
    async with running_server(tls=server_context(authority, mutual=True)) as server:
        with pytest.raises(
            RelayUnreachableError, match=f"({PEER_CLOSED}|certificate required); it may require a client certificate"
        ):
            async with connect(str(server.endpoint), tls=client_context(authority)):
                pass
        context = client_context(authority)
        authority.issue_cert("agent@example.org").configure_cert(context)
        async with connect(str(server.endpoint), tls=context) as client:
            assert (await client.call("echo", "hi")).text == "hi"


async def test_a_relay_that_is_silent_in_the_handshake_is_given_up(
    authority: trustme.CA, mock_clock: MockClock
) -> None:
    async with fake_relay(stay, LONG) as relay, trio.open_nursery() as nursery:
        nursery.start_soon(jump_when_idle, mock_clock, 11)
        with pytest.raises(RelayUnreachableError, match=r"TLS handshake with relay tls://.* failed: no answer in 10 s"):
            async with connect(relay.authority, tls=client_context(authority)):
                pass
