"""Sends a request again, edited or not: to the local server, and to nothing else.

page ──► replay ──► checked (h11) ──► local server        both directions through a tap: a new exchange, marked
"""

from __future__ import annotations

import re
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import h11
import trio

from tunneld.errors import LimitReachedError, UsageError, reason_of
from tunneld.inspector.recorder import ConnectionTap, Recorder
from tunneld.inspector.records import Exchange, Headers
from tunneld.inspector.redaction import PLACEHOLDER, restore_headers, restore_target
from tunneld.wire.proxy_protocol import encode_v2

MAX_BODY = 1 << 20
"""Bytes of an edited body: what a person edits, and no upload."""
MAX_TARGET = 8192
"""Characters of a path with its query, as servers have it."""
TIMEOUT = 30.0
"""Seconds for the whole answer."""
MAX_AT_ONCE = 4
"""Replays at a time: a page asks for one."""
NOT_REPLAYED = frozenset(
    ("connection", "keep-alive", "proxy-connection", "te", "transfer-encoding", "upgrade", "content-length", "expect")
)
"""Fields of the connection, not of the request (RFC 9110 §7.6.1); the length is counted again."""
VISITOR = "inspector"
"""The visitor of a replay."""
_METHOD = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,32}")

Dial = Callable[[], Awaitable[socket.socket]]
"""Connects to the local server. Raises OSError."""


@dataclass(frozen=True, slots=True)
class Edits:
    """A request as it is to be sent. Parts that are None are as they were."""

    method: str | None = None
    target: str | None = None
    headers: Headers | None = None
    body: bytes | None = None


@dataclass(frozen=True, slots=True)
class ReplayTarget:
    """The local server of an exposure."""

    dial: Dial
    url: str
    """As a base for curl: `http://127.0.0.1:8000`."""
    proxy_header: bool = False
    """Whether it expects a PROXY header."""


class Replayer:
    """Sends requests again, a few at a time."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._running = 0

    async def replay(self, exchange: Exchange, edits: Edits, server: ReplayTarget) -> None:
        """Send it, and wait for the whole answer. The recorder keeps both. Raises `UsageError` with a sentence for the
        page, `LimitReachedError`, and what the local server does wrong as `UsageError`, too.
        """
        if self._running >= MAX_AT_ONCE:
            raise LimitReachedError(f"{MAX_AT_ONCE} replays are running; wait for one of them")
        connection = h11.Connection(h11.CLIENT)
        try:
            output = _encoded(connection, exchange, edits)
        except h11.LocalProtocolError as error:
            raise UsageError(f"this is no valid request: {error}") from None
        tap = self._recorder.tap(
            exchange.exposure, VISITOR, has_proxy_header=server.proxy_header, replay_of=exchange.id
        )
        if tap is None:
            raise LimitReachedError("too many connections are being inspected")
        self._running += 1
        try:
            with trio.fail_after(TIMEOUT):
                await _exchange(connection, output, server, tap)
        except trio.TooSlowError:
            raise UsageError(f"the local server has not answered within {TIMEOUT:g} s") from None
        except OSError as error:
            raise UsageError(f"could not connect to the local server: {reason_of(error)}") from None
        except h11.RemoteProtocolError as error:
            raise UsageError(f"the answer of the local server is not valid: {error}") from None
        except trio.BrokenResourceError:
            raise UsageError("the local server has reset the connection") from None
        finally:
            self._running -= 1
            tap.end()


def _encoded(connection: h11.Connection, exchange: Exchange, edits: Edits) -> bytes:
    """The bytes of the request. Raises `UsageError`, and `h11.LocalProtocolError` where it is not valid."""
    original = exchange.request
    if original is None:
        raise UsageError("this is no HTTP request")
    if exchange.upgrade:
        raise UsageError(f"a connection of {exchange.upgrade} cannot be replayed")
    method = edits.method if edits.method is not None else original.method
    target = edits.target if edits.target is not None else original.target
    headers = edits.headers if edits.headers is not None else original.headers
    body = edits.body
    if body is None:
        if original.size and not original.is_whole:
            kept = f"only {len(original.body)} of {original.size} bytes of its body are kept"
            raise UsageError(f"it cannot be replayed as it was: {kept}; edit the body to send another one")
        body = bytes(original.body)
    if not _METHOD.fullmatch(method) or method == "CONNECT":
        raise UsageError(f"{method[:40]!r} is not a method to replay")
    if len(target) > MAX_TARGET or not target.isascii() or not target.isprintable() or " " in target:
        raise UsageError(f"the path must be at most {MAX_TARGET} characters of ASCII, without spaces")
    if not target.startswith(("/", "http://", "https://")) and target != "*":
        raise UsageError("the path must begin with /")
    if len(body) > MAX_BODY:
        raise UsageError(f"the body exceeds {MAX_BODY} bytes")
    target, headers = restore_target(target, original.target), restore_headers(headers, original.headers)
    sent = [(name, value) for name, value in headers if name.lower() not in NOT_REPLAYED]
    _check_no_placeholder(target, sent)
    if not any(name.lower() == "host" for name, _ in sent):
        sent.insert(0, ("Host", original.header("host") or "localhost"))
    sent.append(("Connection", "close"))
    if body or method in {"POST", "PUT", "PATCH"}:
        sent.append(("Content-Length", str(len(body))))
    try:
        fields = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in sent]
    except UnicodeEncodeError:
        raise UsageError("header fields must be ISO 8859-1") from None
    head = connection.send(h11.Request(method=method, target=target, headers=fields)) or b""
    data = connection.send(h11.Data(body)) or b""
    return head + data + (connection.send(h11.EndOfMessage()) or b"")


def _check_no_placeholder(target: str, headers: Headers) -> None:
    """An edited secret must not be sent as the placeholder. Raises `UsageError`."""
    for name, value in headers:
        if PLACEHOLDER in value:
            raise UsageError(
                f"{name} has {PLACEHOLDER} in an edited value: reveal the secrets first, or write them out"
            )
    if f"={PLACEHOLDER}" in target:
        raise UsageError(f"the path has {PLACEHOLDER} in a new parameter: reveal the secrets first, or write them out")


async def _exchange(connection: h11.Connection, output: bytes, server: ReplayTarget, tap: ConnectionTap) -> None:
    """Send, and read the answer up to its end."""
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(await server.dial()))
    async with stream:
        if server.proxy_header:
            output = encode_v2(None, None) + output
        tap.on_written(output)
        failures: list[Exception] = []  # so that they come out of the nursery as they are
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_send, stream, output)
            try:
                await _receive(connection, stream, tap)
            except (h11.RemoteProtocolError, trio.BrokenResourceError) as error:
                failures.append(error)
            nursery.cancel_scope.cancel()
        if failures:
            raise failures[0]


async def _receive(connection: h11.Connection, stream: trio.SocketStream, tap: ConnectionTap) -> None:
    """Read the answer up to its end."""
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            data = await stream.receive_some()
            tap.on_read(data)
            connection.receive_data(data)
        elif isinstance(event, h11.EndOfMessage | h11.ConnectionClosed):
            return


async def _send(stream: trio.SocketStream, output: bytes) -> None:
    """Send the request; a server may answer and close before it has read all of it."""
    try:
        await stream.send_all(output)
    except trio.BrokenResourceError:
        return
