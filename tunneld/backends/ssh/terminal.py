"""What a session shows: addresses, a picture of one, and counts."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import suppress

import asyncssh
import segno
import trio

from tunneld.tunnel.tunnel import Tunnel

MAX_UNREAD = 64 * 1024
"""Octets that wait for somebody who does not read; what comes beyond that is not shown."""
INTERVAL = 1.0
"""Seconds between two looks at the counts: as often as a person reads."""


class Terminal:
    """What one session shows: lines, and below them, on a terminal, the counts."""

    def __init__(self, channel: asyncssh.SSHServerChannel[str], *, is_terminal: bool, scheme: str = "") -> None:
        self.scheme = scheme  # of the address in a picture; empty: no picture
        self._channel = channel
        self._is_terminal = is_terminal
        self._shown = ""
        self._scope = trio.CancelScope()

    def tell(self, text: str, *, is_complaint: bool = False) -> None:
        """Lines that stay, for somebody who reads."""
        if self._channel.get_write_buffer_size() > MAX_UNREAD:
            return
        if self._is_terminal:
            text = ("\r\x1b[K" if self._shown else "") + text.replace("\n", "\r\n")
            self._shown = ""
        with suppress(OSError):
            (self._channel.write_stderr if is_complaint else self._channel.write)(text)

    async def run(self, tunnels: Callable[[], list[Tunnel]]) -> None:
        """Keep the counts right, until ended."""
        with self._scope:
            while True:
                line = counts(tunnels())
                if line != self._shown and not self._channel.get_write_buffer_size():
                    self._shown = line
                    with suppress(OSError):
                        self._channel.write(f"\r\x1b[K{line}")
                await trio.sleep(INTERVAL)

    def end(self) -> None:
        """Show nothing more. Harmless when repeated."""
        if self._shown:
            self._shown = ""  # the counts stay
            self.tell("\n")
        self._scope.cancel()


def describe(tunnel: Tunnel, scheme: str = "") -> str:
    """Both addresses of a tunnel, and a picture of the one for visitors where a scheme is given."""
    client = tunnel.client_uri
    text = f"\ntunnel {tunnel.id} is open\n  visitors      {client}\n  hidden server {tunnel.server_uri}\n"
    return text + (f"\n{picture(f'{scheme}://{client.authority}/')}" if scheme else "")


def picture(address: str) -> str:
    """An address as a QR code of half blocks, with the address below."""
    out = io.StringIO()
    segno.make(address, error="l").terminal(out, compact=True)
    return f"{out.getvalue()}{address}\n"


def counts(tunnels: list[Tunnel]) -> str:
    """One line of what goes on."""
    if not tunnels:
        return "no tunnel: say -R 0:localhost:PORT, or Ctrl-C"
    up, down = (sum(way) for way in zip(*(tunnel.octets for tunnel in tunnels), strict=True))
    visitors, served = sum(len(tunnel.visitors) for tunnel in tunnels), sum(tunnel.served for tunnel in tunnels)
    return f"visitors {visitors}, served {served}, up {size(up)}, down {size(down)}   (Ctrl-C ends it)"


def size(octets: int) -> str:
    """`0 B`, `1.5 kB`, `20 MB`."""
    value = float(octets)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 10 else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def row(tunnel: Tunnel) -> str:
    up, down = tunnel.octets
    name = tunnel.spec.options.name or "-"
    return (
        f"{tunnel.id}  {tunnel.phase.value:8}  {tunnel.client_uri}  {name}  "
        f"visitors {len(tunnel.visitors)}  served {tunnel.served}  up {size(up)}  down {size(down)}\n"
    )
