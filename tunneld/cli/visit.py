"""`tunnel visit`: connect to a private tunnel, from a port on this machine or from standard input and output.

run
├─ engine              all data, see engine/
├─ writers             standard output: the address; standard error: events
├─ NetworkMonitor      notices that the network has changed
└─ VisitPort           a stream for each client, in few sessions, see agent/visit_port.py; or, with -W, one of each
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import stat
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import trio

from tunneld.agent.events import Reporter
from tunneld.agent.network import NetworkMonitor
from tunneld.agent.visit import VisitedTunnel, open_session
from tunneld.agent.visit_port import VisitPort
from tunneld.agent.visit_sessions import VisitLimits, VisitSessions
from tunneld.cli.access import access
from tunneld.cli.common import complain, printable
from tunneld.cli.expose import prepare
from tunneld.cli.output import STDERR, STDOUT
from tunneld.cli.reporters import JsonReporter, LineReporter, QuietReporter
from tunneld.cli.writer import Writer
from tunneld.config.trust import TrustedPeers, load_identity
from tunneld.engine import new_engine
from tunneld.engine.engine import Relay, RelayEnd
from tunneld.engine.limits import POLL_TIMEOUT
from tunneld.engine.stream_end import StreamEnd
from tunneld.errors import ListenError, RelayUnreachableError, UsageError, reason_of
from tunneld.net.endpoint import format_peer, parse_host_port
from tunneld.tls.one_time import OneTimeCode

LOOPBACK = "127.0.0.1"
CHUNK = 65536
"""Bytes read from a file at a time."""
HANGUP_TIMEOUT = 1.0
"""Seconds for a visit to end after SIGHUP: some round trips. The other end would report a broken connection."""
BACKLOG = 128
"""Clients that may wait to be accepted."""


async def run(options: argparse.Namespace) -> int:
    """Visit until stopped by a signal; with `-W`, once, until both directions have ended. Returns 0, or raises."""
    tunnel, where = what_to_visit(options)
    prepare()
    if options.stdio:
        await _visit_on_stdio(options, tunnel)
        return os.EX_OK
    async with AsyncExitStack() as stack:
        scope = stack.enter_context(trio.CancelScope())
        signals = stack.enter_context(trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM))
        err = await stack.enter_async_context(Writer(STDERR, vital=False).open())
        out = await stack.enter_async_context(Writer(STDOUT, vital=options.json).open())
        reporter = _reporter(options, out, err)
        nursery = await stack.enter_async_context(trio.open_nursery())
        engine = new_engine(poll_timeout=POLL_TIMEOUT)
        await nursery.start(engine.run)
        nursery.start_soon(_cancel_on_signal, signals, scope)
        monitor = NetworkMonitor()
        nursery.start_soon(monitor.run)
        limits = VisitLimits(options.idle, options.wait)
        on_over = scope.cancel if options.once else None
        sessions = VisitSessions(engine, access(options), tunnel, reporter, monitor, limits, on_over=on_over)
        port = VisitPort(engine, sessions, tunnel, reporter, linger=options.linger)
        listener = stack.enter_context(_listen(*where))
        address = format_peer(listener.getsockname())
        await sessions.start()
        reporter.report("opened", address=address, peer=tunnel.title, id=str(tunnel.host))
        if not options.json and not options.quiet:
            err.put(printable(f"{address} leads to {tunnel.title} ({tunnel.host})") + "\n")
        await port.run(listener)
    return os.EX_OK


def what_to_visit(options: argparse.Namespace) -> tuple[VisitedTunnel, tuple[str, int]]:
    """The tunnel, and where to listen. Raises `UsageError`, and `ConfigError` for files that cannot be used."""
    words = list(options.words)
    if options.once:
        text = sys.stdin.readline() if options.once == "-" else options.once
        tunnel = VisitedTunnel.invited(OneTimeCode.parse(text.strip()))
    elif not words:
        raise UsageError("which tunnel? give its name and owner, such as shell@alice, or --once CODE")
    else:
        reference = words.pop(0)
        tunnel = VisitedTunnel.known(TrustedPeers().resolve(reference), reference, load_identity(options.identity))
    if len(words) > 1 or (options.stdio and words):
        raise UsageError(f"unexpected argument {words[-1]!r}; usage: tunnel visit NAME@PEER [[HOST:]PORT]")
    if not words:
        return tunnel, (LOOPBACK, 0)
    return tunnel, parse_host_port(words[0] if ":" in words[0] else f"{LOOPBACK}:{words[0]}")


def _reporter(options: argparse.Namespace, out: Writer, err: Writer) -> Reporter:
    if options.json:
        return JsonReporter(out, "tcp")
    return (QuietReporter if options.quiet else LineReporter)(out, err, "tcp")


def _listen(host: str, port: int) -> socket.socket:
    """A listener. Raises `ListenError`."""
    try:
        family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, number)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.setblocking(False)
            listener.bind(address)
            listener.listen(BACKLOG)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        raise ListenError(f"could not listen on {host}:{port}: {reason_of(error)}") from None
    return listener


async def _cancel_on_signal(signals: AsyncIterator[int], scope: trio.CancelScope) -> None:
    async for _ in signals:
        scope.cancel()


# Standard input and output


async def _visit_on_stdio(options: argparse.Namespace, tunnel: VisitedTunnel) -> None:
    """One stream between standard input and output. Raises `RelayUnreachableError` where it is cut."""
    ended = trio.Event()
    result: list[RelayEnd] = []

    def on_end(_relay: Relay, end: RelayEnd) -> None:
        result.append(end)
        ended.set()

    with trio.open_signal_receiver(signal.SIGHUP) as hangups:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_cancel_after_hangup, hangups, nursery.cancel_scope)
            engine = new_engine(poll_timeout=POLL_TIMEOUT)
            await nursery.start(engine.run)
            session = await open_session(engine, access(options), tunnel)
            if not options.quiet:
                complain(printable(f"tunnel: {tunnel.title} ({tunnel.host}), end-to-end: yes"))
            stream = StandardStream()
            channel = session.open()
            engine.join(StreamEnd(channel.engine, stream), channel, linger=options.linger, on_end=on_end)
            await ended.wait()
            await stream.closed.wait()  # what the relay has delivered may still be on its way to standard output
            await session.finish()
            nursery.cancel_scope.cancel()
    if result and result[0].error is not None:
        raise RelayUnreachableError(f"the visit to {tunnel.title} was cut: {result[0]}")


async def _cancel_after_hangup(hangups: AsyncIterator[int], scope: trio.CancelScope) -> None:
    """Ssh sends SIGHUP when it has ended, and waits: both directions are about to end by themselves."""
    async for _ in hangups:
        await trio.sleep(HANGUP_TIMEOUT)
        scope.cancel()


class StandardStream(trio.abc.HalfCloseableStream):
    """Standard input and output as one stream: pipes, a socket, a terminal, or files."""

    def __init__(self) -> None:
        self.closed = trio.Event()
        about = [os.fstat(descriptor) for descriptor in (0, 1)]
        self._socket: trio.SocketStream | None = None
        if all(stat.S_ISSOCK(one.st_mode) for one in about) and about[0].st_ino == about[1].st_ino:
            self._socket = trio.SocketStream(trio.socket.from_stdlib_socket(socket.socket(fileno=os.dup(0))))
        self._source: trio.abc.ReceiveStream = self._socket or _source(about[0])
        self._sink: trio.abc.SendStream = self._socket or _sink(about[1])

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        """See `trio.abc.ReceiveStream`."""
        return await self._source.receive_some(max_bytes)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """See `trio.abc.SendStream`."""
        await self._sink.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        """See `trio.abc.SendStream`."""
        await self._sink.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        """See `trio.abc.HalfCloseableStream`."""
        await (self._sink.aclose() if self._socket is None else self._socket.send_eof())

    async def aclose(self) -> None:
        """See `trio.abc.AsyncResource`."""
        self.closed.set()
        try:
            await self._source.aclose()
        finally:
            await self._sink.aclose()


def _source(about: os.stat_result) -> trio.abc.ReceiveStream:
    return FileStream(0) if stat.S_ISREG(about.st_mode) else trio.lowlevel.FdStream(0)


def _sink(about: os.stat_result) -> trio.abc.SendStream:
    """A terminal is written to as a file: it has one mode with standard input, which goes on after the end of file. A
    pipe is closed at the end of file, for which its reader waits.
    """
    return FileStream(1) if stat.S_ISREG(about.st_mode) or os.isatty(1) else trio.lowlevel.FdStream(1)


class FileStream(trio.abc.Stream):
    """A file, which is always ready: epoll does not take it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """See `trio.abc.ReceiveStream`."""
        await trio.lowlevel.checkpoint()
        return os.read(self._descriptor, max_bytes or CHUNK)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """See `trio.abc.SendStream`."""
        await trio.lowlevel.checkpoint()
        try:
            with memoryview(data) as rest:
                at = 0
                while at < len(rest):
                    at += os.write(self._descriptor, rest[at:])
        except OSError as error:
            raise trio.BrokenResourceError(str(error)) from error

    async def wait_send_all_might_not_block(self) -> None:
        """See `trio.abc.SendStream`."""
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        """See `trio.abc.AsyncResource`."""
        await trio.lowlevel.checkpoint()
