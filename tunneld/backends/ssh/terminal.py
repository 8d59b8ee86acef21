"""What a session displays: addresses, a QR code, and a status line."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import suppress

import asyncssh
import segno
import trio

from tunneld.net.endpoint import WEB_PORTS
from tunneld.policy.units import format_size
from tunneld.tunnel.tunnel import Tunnel
from tunneld.wire.lines import Item

MAX_UNREAD = 64 * 1024
"""Characters buffered for a client that does not read. More output is dropped."""
STATUS_INTERVAL = 1.0
"""Seconds between two updates of the status line."""


class Terminal:
    """The output of one session: lines, and on a terminal a status line below them."""

    def __init__(self, channel: asyncssh.SSHServerChannel[str], *, is_terminal: bool, scheme: str = "") -> None:
        """`scheme` is that of the address in a QR code; empty: no code."""
        self.scheme = scheme
        self._channel = channel
        self._is_terminal = is_terminal
        self._status = ""
        self._scope = trio.CancelScope()

    def print(self, text: str, *, is_error: bool = False) -> None:
        """Print complete lines in place of the status line, unless too much is unread."""
        if self._channel.get_write_buffer_size() > MAX_UNREAD:
            return
        if self._is_terminal:
            text = ("\r\x1b[K" if self._status else "") + text.replace("\n", "\r\n")
            self._status = ""
        with suppress(OSError):
            (self._channel.write_stderr if is_error else self._channel.write)(text)

    async def run(self, tunnels: Callable[[], list[Tunnel]]) -> None:
        """Keep the status line up to date until `end`. A task of the connection runs this."""
        with self._scope:
            while True:
                line = status_line(tunnels())
                if line != self._status and not self._channel.get_write_buffer_size():
                    self._status = line
                    with suppress(OSError):
                        self._channel.write(f"\r\x1b[K{line}")
                await trio.sleep(STATUS_INTERVAL)

    def end(self) -> None:
        """Display nothing more; the last status line stays. Idempotent."""
        if self._status:
            self._status = ""
            self.print("\n")
        self._scope.cancel()


def describe(tunnel: Tunnel, scheme: str = "") -> str:
    """The addresses of a tunnel, and a QR code of the public one if a scheme is given. A host name has its own."""
    client = tunnel.client_uri
    text = f"\ntunnel {tunnel.id} is open\n  public address  {client}\n  server URI      {tunnel.server_uri}\n"
    if not scheme:
        return text
    return f"{text}\n{qr_code(str(client) if client.scheme in WEB_PORTS else f'{scheme}://{client.authority}/')}"


def qr_code(address: str) -> str:
    """A QR code in half blocks, and the address below it."""
    out = io.StringIO()
    segno.make(address, error="l").terminal(out, compact=True)
    return f"{out.getvalue()}{address}\n"


def status_line(tunnels: list[Tunnel]) -> str:
    """Visitors and bytes of these tunnels, in one line."""
    if not tunnels:
        return "no tunnel is open: use -R 0:localhost:PORT to open one   (Ctrl-C to quit)"
    up, down = (sum(direction) for direction in zip(*(tunnel.octets for tunnel in tunnels), strict=True))
    visitors, served = sum(len(tunnel.visitors) for tunnel in tunnels), sum(tunnel.served for tunnel in tunnels)
    return f"visitors {visitors}, served {served}, up {format_size(up)}, down {format_size(down)}   (Ctrl-C to quit)"


def row(item: Item) -> str:
    """The line of a tunnel in the output of `list`, from its item of the verb."""
    up, down = (format_size(int(item[direction] or 0)) for direction in ("up", "down"))
    return (
        f"{item['id']}  {item['phase']:8}  {item['client']}  {item['name'] or '-'}  "
        f"visitors {item['visitors']}  served {item['served']}  up {up}  down {down}\n"
    )
