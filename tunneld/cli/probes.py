"""What tells other programs whether the exposures of an agent are reachable: a file, a status server, systemd.

run
├─ ready file        there while all exposures are reachable, with their addresses
├─ status server     see agent/status_server.py
└─ systemd           READY once each exposure is reachable or has failed for the first time: an agent that keeps
trying has started. STATUS and WATCHDOG after that
"""

from __future__ import annotations

import argparse
import ipaddress
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import trio

from tunneld import systemd
from tunneld.agent.status import AgentStatus
from tunneld.agent.status_server import open_listener, serve
from tunneld.cli.output import AgentOutput
from tunneld.cli.reporters import public_address
from tunneld.errors import UsageError, reason_of
from tunneld.net.endpoint import format_peer, parse_host_port

UPDATE_INTERVAL = 10.0
"""Seconds between two status lines for systemd."""
LOOPBACK = "127.0.0.1"


@asynccontextmanager
async def open_probes(
    options: argparse.Namespace, status: AgentStatus, output: AgentOutput, schemes: dict[str, str]
) -> AsyncIterator[None]:
    """Serve probes during the block. `schemes` has that of the address of each exposure, by name.

    Raises `UsageError` and `ListenError` for options that cannot be served.
    """
    probes = _Probes(status, schemes, options.ready_file)
    probes.update_file()
    async with trio.open_nursery() as nursery:
        if options.status_address:
            host, port = parse_status_address(options.status_address)
            listener = await open_listener(host, port)
            if port == 0:
                output.board.notice(f"the status is at http://{format_peer(listener.socket.getsockname())}/")
            nursery.start_soon(serve, status, listener)
        if options.ready_file:
            nursery.start_soon(probes.keep_file)
        if systemd.is_available():
            nursery.start_soon(probes.notify_systemd)
        try:
            yield
        finally:
            probes.close()
            nursery.cancel_scope.cancel()


def parse_status_address(text: str) -> tuple[str, int]:
    """Read `PORT` or `ADDRESS:PORT`. Raises `UsageError`."""
    host, port = parse_host_port(f"{LOOPBACK}:{text}" if text.isdecimal() else text)
    try:
        ipaddress.ip_address(host)
    except ValueError:
        raise UsageError(f"{text!r} is not PORT or ADDRESS:PORT of this machine") from None
    return host, port


class _Probes:
    """The ready file, and what systemd is told."""

    def __init__(self, status: AgentStatus, schemes: dict[str, str], ready_file: Path | None) -> None:
        self._status = status
        self._schemes = schemes
        self._file = ready_file
        self._changed = trio.Event()
        status.on_change.append(self._on_change)

    def _on_change(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def keep_file(self) -> None:
        """Write and remove the ready file until cancelled."""
        while True:
            await self._changed.wait()
            self.update_file()

    def update_file(self) -> None:
        """Write the ready file if all exposures are ready, else remove it. Raises `UsageError`."""
        if self._file is None:
            return
        try:
            if not self._status.ready:
                self._file.unlink(missing_ok=True)
                return
            temporary = self._file.with_name(f".{self._file.name}.{os.getpid()}")
            temporary.write_text(self._addresses())
            temporary.rename(self._file)
        except OSError as error:
            raise UsageError(f"could not write the ready file {self._file}: {reason_of(error)}") from None

    def _addresses(self) -> str:
        """A line for each exposure: its address, with its name in front if there are several."""
        lines = []
        for one in self._status.exposures:
            address = public_address(one.address, self._schemes.get(one.name, "tcp"), one.ports)
            lines.append(f"{one.name}\t{address}\n" if one.name else f"{address}\n")
        return "".join(lines)

    async def notify_systemd(self) -> None:
        """Report to systemd until cancelled."""
        interval, is_ready = systemd.watchdog_interval(), False
        pause = min(UPDATE_INTERVAL, (interval or 2 * UPDATE_INTERVAL) / 2)
        while True:
            if self._status.settled and not is_ready:
                is_ready = systemd.ready(str(self._status))
            elif interval is None:
                systemd.status(str(self._status))
            else:
                systemd.alive(str(self._status))
            with trio.move_on_after(pause):
                await self._changed.wait()

    def close(self) -> None:
        """The agent ends: there is nothing to reach any more."""
        systemd.stopping()
        if self._file is not None:
            with suppress(OSError):
                self._file.unlink(missing_ok=True)
