"""What a person at the other end sees, and the few words that are answered.

    ssh -R 0:localhost:8000 relay -p 7022           the addresses, then a line of counts, until Ctrl-C
    ssh -R 0:localhost:8000 relay -p 7022 qr        the same, with a picture for a telephone
    ssh relay -p 7022 list | close ID | help        about the tunnels of this credential

Everything else that a shell could do is not here.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Protocol

import asyncssh
import trio

from tunneld import __version__
from tunneld.backends.ssh.terminal import Terminal, describe, row
from tunneld.directory.requester import Requester
from tunneld.directory.service import TunnelService
from tunneld.errors import TunneldError, UsageError
from tunneld.tunnel.tunnel import Tunnel

MAX_SESSIONS = 10
"""On one connection, as OpenSSH's MaxSessions."""
LONGEST_SCHEME = 32
"""Characters: the longest that IANA lists has 29 and is nothing that a tunnel carries. Large pictures take long."""
ENDS = frozenset("\x03\x04q")
"""Ctrl-C, Ctrl-D and q: a terminal in raw mode sends them as characters."""
HELP = """\
list              the tunnels of your credential
close ID          end one of them
help              this
qr [SCHEME]       with -R: the address as a QR code, too; http://HOST:PORT/ unless SCHEME is another

ssh -R 0:localhost:8000 ...      opens a tunnel to port 8000 at your end and prints its address; -N does so silently
"""


class ConsoleUser(Protocol):
    """What a conversation needs of its connection."""

    @property
    def nursery(self) -> trio.Nursery:
        """For what it shows."""

    @property
    def service(self) -> TunnelService:
        """The tunnels."""

    @property
    def asker(self) -> Requester:
        """As whom it speaks. Raises `NotAllowedError` where its credential is gone."""

    @property
    def tunnels(self) -> list[Tunnel]:
        """Those that are served by this connection."""

    def drain(self) -> None:
        """The person wants no more: its tunnels close, and the client may go by itself."""


class Console:
    """All that is said to one connection's sessions; what comes before there is one is kept, a few lines."""

    MOST_KEPT = 64

    def __init__(self, person: ConsoleUser) -> None:
        self.person = person
        self.sessions = 0
        self._screens: list[Terminal] = []
        self._kept: list[tuple[bool, str]] = []

    def attach(self, screen: Terminal) -> None:
        """A session wants to see what there is."""
        self._screens.append(screen)
        for tunnel in self.person.tunnels:
            screen.tell(describe(tunnel, screen.scheme))
        for is_complaint, text in self.take_kept():
            screen.tell(text, is_complaint=is_complaint)

    def take_kept(self) -> list[tuple[bool, str]]:
        """What was said before anybody was there to see it: whether it is a complaint, and the lines."""
        kept, self._kept = self._kept, []
        return kept

    def detach(self, screen: Terminal) -> None:
        """A session has ended. Harmless when repeated."""
        with suppress(ValueError):
            self._screens.remove(screen)

    def opened(self, tunnel: Tunnel) -> None:
        """A tunnel is there."""
        for screen in self._screens:
            screen.tell(describe(tunnel, screen.scheme))

    def closed(self, tunnel: Tunnel | None, reason: str) -> None:
        """One is no more."""
        self._say(f"tunnel {tunnel.id} closed: {reason}" if tunnel is not None else f"closed: {reason}")

    def complain(self, reason: str) -> None:
        """Something was refused."""
        self._say(f"tunneld: {reason}", is_complaint=True)

    def _say(self, text: str, *, is_complaint: bool = False) -> None:
        for screen in self._screens:
            screen.tell(text + "\n", is_complaint=is_complaint)
        if not self._screens and len(self._kept) < self.MOST_KEPT:
            self._kept.append((is_complaint, text + "\n"))


class ConsoleSession(asyncssh.SSHServerSession[str]):
    """A shell or a word, on a terminal or not."""

    def __init__(self, conversation: Console) -> None:
        conversation.sessions += 1  # from here on: what is asked for at once must not pass for the first
        self._conversation = conversation
        self._words: list[str] = []
        self._is_terminal = False
        self._screen: Terminal | None = None
        self._channel: asyncssh.SSHServerChannel[str]

    def connection_made(self, chan: asyncssh.SSHServerChannel[str]) -> None:
        """See asyncssh."""
        self._channel = chan

    def pty_requested(self, term_type: str, term_size: tuple[int, int, int, int], term_modes: object) -> bool:
        """Lines are told over, and Ctrl-C comes as a character."""
        self._is_terminal = True
        return True

    def shell_requested(self) -> bool:
        """What there is to see."""
        return True

    def exec_requested(self, command: str) -> bool:
        """A word."""
        self._words = command.split()
        return True

    def subsystem_requested(self, subsystem: str) -> bool:
        """None: no sftp."""
        return False

    def session_started(self) -> None:
        """Answer."""
        match self._words:
            case []:
                self._show("")
            case ["qr"]:
                self._show("http")
            case ["qr", scheme] if scheme.isalnum() and len(scheme) <= LONGEST_SCHEME:
                self._show(scheme)
            case _:
                self._conversation.person.nursery.start_soon(self._answer)

    def data_received(self, data: str, datatype: int | None = None) -> None:
        """A key was pressed."""
        if self._is_terminal and self._screen is not None and ENDS & set(data):
            self._end()

    def break_received(self, msec: int) -> bool:
        """As Ctrl-C."""
        self._end()
        return True

    def signal_received(self, signal: str) -> None:
        """As Ctrl-C."""
        self._end()

    def eof_received(self) -> bool:
        """Standard input has ended, as with `< /dev/null`: that ends nothing."""
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncssh."""
        self._conversation.sessions -= 1
        if self._screen is not None:
            self._conversation.detach(self._screen)
            self._screen.end()

    # Inside

    def _show(self, scheme: str) -> None:
        self._screen = Terminal(self._channel, is_terminal=self._is_terminal, scheme=scheme)
        self._conversation.attach(self._screen)
        if self._is_terminal:
            person = self._conversation.person
            person.nursery.start_soon(self._screen.run, lambda: person.tunnels)

    def _end(self) -> None:
        """The person wants no more of it."""
        if self._screen is not None:
            self._screen.end()
            self._conversation.detach(self._screen)
        self._channel.exit(0)
        self._conversation.person.drain()

    async def _answer(self) -> None:
        """The words that are answered once."""
        for is_complaint, kept in self._conversation.take_kept():
            if is_complaint:
                self._channel.write_stderr(self._lines(kept))
        try:
            text, status = await self._run(), 0
        except TunneldError as error:
            text, status = "", error.exit_status
            self._channel.write_stderr(self._lines(f"tunneld: {error}\n"))
        with suppress(OSError):
            self._channel.write(self._lines(text))
            self._channel.exit(status)

    async def _run(self) -> str:
        service, asker = self._conversation.person.service, self._conversation.person.asker
        match self._words:
            case ["help" | "--help" | "?"]:
                return f"tunneld {__version__}\n\n{HELP}"
            case ["list"]:
                return "".join(map(row, service.tunnels(asker.known_grant))) or "no tunnel is open\n"
            case ["close", reference]:
                return f"closed {(await service.close(reference, asker.known_grant)).id}\n"
        raise UsageError(
            f"{self._words[0][:40]!r} is not answered here, there is no shell: say list, close ID, qr or help"
        )

    def _lines(self, text: str) -> str:
        return text.replace("\n", "\r\n") if self._is_terminal else text
