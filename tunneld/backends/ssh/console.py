"""The sessions of a user: lines about the tunnels, and a few commands.

    ssh -R 0:localhost:8000 relay -p 7022           the addresses, then a status line, until Ctrl-C
    ssh -R 0:localhost:8000 relay -p 7022 qr        the same, with a QR code of the public address
    ssh -R blog:80:localhost:8000 relay -p 7022     the same with a host name
    ssh relay -p 7022 list | close ID | help        commands about the tunnels of this credential

There is no shell. The commands are verbs of the control protocol; its table executes them and checks roles.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Protocol

import asyncssh
import trio

from tunneld import __version__
from tunneld.backends.ssh.terminal import Terminal, describe, row
from tunneld.directory.reply import ITEMS_PER_STEP, Execute, Reply
from tunneld.directory.requester import Requester
from tunneld.errors import NotAllowedError, TunneldError, UsageError
from tunneld.tunnel.tunnel import Tunnel
from tunneld.wire.lines import ControlRequest

MAX_SESSIONS = 10
"""Sessions per connection, as OpenSSH's MaxSessions."""
MAX_SCHEME_CHARACTERS = 32
"""Length of a URI scheme in a QR code: the longest that IANA lists has 29. Large codes take long to draw."""
QUIT_KEYS = frozenset("\x03\x04q")
"""Ctrl-C, Ctrl-D and q: a terminal in raw mode sends them as characters."""
NO_GRANT = "a tunnel's key permits no commands; log in with a public key of a credential"
HELP = """\
list           list the tunnels of your credential
close ID       close one of them (close ID keep: its address stays reserved)
help           show this help
qr [SCHEME]    with -R: also show the public address as a QR code, as http://HOST:PORT/ or with another scheme

ssh -R 0:localhost:8000 ...    open a tunnel to port 8000 on your side and show its addresses
                               (with -N, ssh shows only the public port)
ssh -R NAME:80:localhost:8000 ...
                               the same under a host name, if the relay has them; "any" is a random one

A client that reconnects with the same key, user name and -R gets the same address.
"""
NO_FORWARD = "nothing is forwarded: add -R 0:localhost:PORT to open a tunnel to a port on your side; `help` tells more"


class ConsoleUser(Protocol):
    """The connection that a console belongs to."""

    @property
    def nursery(self) -> trio.Nursery:
        """For the tasks of its sessions."""

    @property
    def execute(self) -> Execute:
        """Executes commands."""

    @property
    def requester(self) -> Requester:
        """The client, as a requester of commands. Raises `NotAllowedError` if its credential was removed."""

    @property
    def tunnels(self) -> list[Tunnel]:
        """The tunnels that this connection serves."""

    @property
    def asked(self) -> bool:
        """Whether the client has sent a -R."""

    async def forwards_decided(self) -> None:
        """Wait until every -R of the client is granted or refused."""

    def drain(self) -> None:
        """The user quits: close the tunnels, and let the client disconnect."""


class Console:
    """The output of one connection to its sessions. Lines from before the first session are kept, up to a limit."""

    MAX_KEPT_LINES = 64

    def __init__(self, user: ConsoleUser) -> None:
        self.user = user
        self.sessions = 0
        self._terminals: list[Terminal] = []
        self._kept: list[tuple[bool, str]] = []

    def attach(self, terminal: Terminal) -> None:
        """A session displays the tunnels: show the open ones, and the kept lines."""
        self._terminals.append(terminal)
        for tunnel in self.user.tunnels:
            terminal.print(describe(tunnel, terminal.scheme))
        for is_error, text in self.take_kept():
            terminal.print(text, is_error=is_error)

    def take_kept(self) -> list[tuple[bool, str]]:
        """Remove and return the kept lines: whether each is an error, and its text."""
        kept, self._kept = self._kept, []
        return kept

    def detach(self, terminal: Terminal) -> None:
        """A session has ended. Idempotent."""
        with suppress(ValueError):
            self._terminals.remove(terminal)

    def on_tunnel_opened(self, tunnel: Tunnel) -> None:
        """Show a tunnel that this connection opened or joined."""
        for terminal in self._terminals:
            terminal.print(describe(tunnel, terminal.scheme))

    def on_tunnel_closed(self, tunnel: Tunnel | None, reason: str) -> None:
        """Report a closed tunnel; None: the tunnel was opened elsewhere, and its forward was closed."""
        self._print(f"tunnel {tunnel.id} closed: {reason}" if tunnel is not None else f"closed: {reason}")

    def print_error(self, reason: str) -> None:
        """Report a refused request."""
        self._print(f"tunneld: {reason}", is_error=True)

    def _print(self, text: str, *, is_error: bool = False) -> None:
        for terminal in self._terminals:
            terminal.print(text + "\n", is_error=is_error)
        if not self._terminals and len(self._kept) < self.MAX_KEPT_LINES:
            self._kept.append((is_error, text + "\n"))


class ConsoleSession(asyncssh.SSHServerSession[str]):
    """A session with a command or without one, with a terminal or without one. asyncssh calls its methods."""

    def __init__(self, console: Console) -> None:
        console.sessions += 1  # counted now: sessions that are requested at once must not exceed the limit
        self._console = console
        self._command: list[str] = []
        self._is_terminal = False
        self._terminal: Terminal | None = None
        self._channel: asyncssh.SSHServerChannel[str]

    def connection_made(self, chan: asyncssh.SSHServerChannel[str]) -> None:
        """See `asyncssh.SSHServerSession.connection_made`."""
        self._channel = chan

    def pty_requested(self, term_type: str, term_size: tuple[int, int, int, int], term_modes: object) -> bool:
        """Accept: the status line is redrawn in place, and Ctrl-C arrives as a character."""
        self._is_terminal = True
        return True

    def shell_requested(self) -> bool:
        """Accept: `session_started` shows the tunnels."""
        return True

    def exec_requested(self, command: str) -> bool:
        """Accept: `session_started` runs the command."""
        self._command = command.split()
        return True

    def subsystem_requested(self, subsystem: str) -> bool:
        """Refuse: there is no sftp."""
        return False

    def session_started(self) -> None:
        """Show the tunnels, or run a command."""
        match self._command:
            case []:
                self._show("")
            case ["qr"]:
                self._show("http")
            case ["qr", scheme] if scheme.isalnum() and len(scheme) <= MAX_SCHEME_CHARACTERS:
                self._show(scheme)
            case _:
                self._console.user.nursery.start_soon(self._run_command)

    def data_received(self, data: str, datatype: int | None = None) -> None:
        """The user pressed keys."""
        if self._is_terminal and self._terminal is not None and QUIT_KEYS & set(data):
            self._quit()

    def break_received(self, msec: int) -> bool:
        """Like Ctrl-C."""
        self._quit()
        return True

    def signal_received(self, signal: str) -> None:
        """Like Ctrl-C."""
        self._quit()

    def eof_received(self) -> bool:
        """Keep the session open: standard input may be /dev/null."""
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """The session has ended."""
        self._console.sessions -= 1
        if self._terminal is not None:
            self._console.detach(self._terminal)
            self._terminal.end()

    # Internals

    def _show(self, scheme: str) -> None:
        if not self._console.user.asked:  # a client sends every -R before it asks for a session
            self._channel.write_stderr(self._convert_newlines(f"tunneld: {NO_FORWARD}\n"))
            self._channel.exit(UsageError.exit_status)
            return
        self._terminal = Terminal(self._channel, is_terminal=self._is_terminal, scheme=scheme)
        self._console.attach(self._terminal)
        if self._is_terminal:
            user = self._console.user
            user.nursery.start_soon(self._terminal.run, lambda: user.tunnels)

    def _quit(self) -> None:
        if self._terminal is not None:
            self._terminal.end()
            self._console.detach(self._terminal)
        self._channel.exit(0)
        self._console.user.drain()

    async def _run_command(self) -> None:
        """Run a command, print its result and exit with its status, once it is known which -R were refused."""
        await self._console.user.forwards_decided()
        for is_error, kept in self._console.take_kept():
            if is_error:
                self._channel.write_stderr(self._convert_newlines(kept))
        try:
            text, status = await self._execute(), 0
        except TunneldError as error:
            text, status = "", error.exit_status
            self._channel.write_stderr(self._convert_newlines(f"tunneld: {error}\n"))
        with suppress(OSError):
            self._channel.write(self._convert_newlines(text))
            self._channel.exit(status)

    async def _execute(self) -> str:
        match self._command:
            case ["help" | "--help" | "?"]:
                return f"tunneld {__version__}\n\n{HELP}"
            case ["list" as verb, *arguments]:
                return await _rows(await self._request(verb, arguments))
            case ["close" as verb, *arguments]:
                return f"{(await self._request(verb, arguments)).text}\n"
        raise UsageError(
            f"unknown command {self._command[0][:40]!r}: this relay has no shell; use list, close ID, qr or help"
        )

    async def _request(self, verb: str, arguments: list[str]) -> Reply:
        """Have a verb executed. Raises `TunneldError`."""
        user = self._console.user
        requester = user.requester
        try:
            return await user.execute(ControlRequest(verb, tuple(arguments)), requester)
        except NotAllowedError:
            if requester.grant is None:
                raise NotAllowedError(NO_GRANT) from None
            raise

    def _convert_newlines(self, text: str) -> str:
        return text.replace("\n", "\r\n") if self._is_terminal else text


async def _rows(reply: Reply) -> str:
    """A line for each tunnel, made in steps like a reply on the control port."""
    lines: list[str] = []
    for first in range(0, len(reply.items), ITEMS_PER_STEP):
        async with reply.step():
            lines += map(row, reply.items[first : first + ITEMS_PER_STEP])
    return "".join(lines) or "no tunnel is open\n"
