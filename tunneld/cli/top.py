"""`tunnel top`: live rates of tunnels and visitors, from the verbs `list` and `show`.

    run
    ├─ screen          see screen.py; keys: keyboard.py; what is shown: top_view.py
    ├─ signals         INT, TERM, HUP: quit
    └─ poll            one request each interval; connects again after a loss

Rates are differences of the relay's counters between two requests, so nothing has to be measured there.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack

import trio

from tunneld.agent.access import RelayAccess
from tunneld.agent.backoff import Backoff
from tunneld.cli.access import access, form
from tunneld.cli.common import on_interrupt, say
from tunneld.cli.keyboard import Keyboard
from tunneld.cli.meter import Meters
from tunneld.cli.output import STDOUT, is_live_terminal
from tunneld.cli.screen import Screen
from tunneld.cli.styled import has_colours
from tunneld.cli.tables import Form, Record, TableColumn, advertised, table
from tunneld.cli.top_rows import TUNNELS, VISITORS, TopColumn, ordered, with_rates
from tunneld.cli.top_view import TopView
from tunneld.cli.writer import Writer
from tunneld.client import Client
from tunneld.errors import NoSuchTunnelError, RefusedError, TunneldError, UsageError


async def run(options: argparse.Namespace) -> int:
    """Show rates until the user quits; with `--once`, print them. Returns 0, or raises."""
    relay = access(options)
    if options.once:
        with on_interrupt(signal.SIG_DFL):
            say(await _once(relay, options), end="")
        return os.EX_OK
    async with AsyncExitStack() as stack:
        out = await stack.enter_async_context(Writer(STDOUT, vital=True).open())
        if options.json or not (is_live_terminal(out) and sys.stdin is not None and sys.stdin.isatty()):
            raise UsageError("`tunnel top` needs a terminal; use --once to print a table")
        signals = stack.enter_context(trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
        client = await stack.enter_async_context(relay.connect())
        await _Top(relay, options, out).run(client, signals)
    return os.EX_OK


async def _once(relay: RelayAccess, options: argparse.Namespace) -> str:
    """The rates of one interval, as a table."""
    key, columns, meters = ("visitor", VISITORS, Meters()) if options.ref else ("id", TUNNELS, Meters())
    async with relay.connect() as client:
        with_rates(meters, trio.current_time(), await _records(client, options.ref), key)
        await trio.sleep(options.interval)
        rows = with_rates(meters, trio.current_time(), await _records(client, options.ref), key)
    rows = ordered(rows, _column(columns, options.sort))
    if form(options) is not Form.PEOPLE:
        return table(rows, [TableColumn(column.key) for column in columns], form(options))
    titled = [{column.title: column.text(row) for column in columns} for row in rows]
    return table(titled, [TableColumn(one.title, right=one.shown is not None) for one in columns], Form.PEOPLE)


def _column(columns: Sequence[TopColumn], key: str) -> TopColumn:
    return next((column for column in columns if column.key == key), columns[0])


async def _records(client: Client, ref: str | None) -> Sequence[Record]:
    """What the relay knows of all tunnels, or of the visitors of one. Raises as any call."""
    return (await client.call("show", ref)).items[1:] if ref else advertised((await client.call("list")).items)


class _Top:
    """The live view of one relay."""

    def __init__(self, relay: RelayAccess, options: argparse.Namespace, out: Writer) -> None:
        self._relay = relay
        self._interval = float(options.interval)
        self._view = TopView(relay.where, self._on_kick, sort=options.sort)
        self._view.tunnel = options.ref or ""
        self._screen = Screen(out, self._view, colours=has_colours())
        self._pressed = trio.Event()  # the view may show something else now
        self._kicks: list[tuple[str, str]] = []

    async def run(self, client: Client, signals: AsyncIterator[int]) -> None:
        """Show it until the user quits. `client` is connected; later ones are made here."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_cancel_on_signal, signals, nursery.cancel_scope)
                keyboard = Keyboard(self._on_key, on_stop=self._screen.stop, on_change=self._screen.redraw)
                nursery.start_soon(keyboard.run)
                nursery.start_soon(self._screen.run)
                await self._poll_forever(client)
                nursery.cancel_scope.cancel()
        finally:
            self._screen.leave()

    def _on_key(self, key: str) -> None:
        self._view.press(key)
        self._screen.draw()
        self._pressed.set()

    def _on_kick(self, tunnel: str, visitor: str) -> None:
        self._kicks.append((tunnel, visitor))

    async def _poll_forever(self, client: Client) -> None:
        """Ask the relay each interval until the user quits, over one connection after another."""
        await self._poll(client)
        backoff = Backoff()
        while not self._view.ended:
            try:
                async with self._relay.connect() as again:
                    backoff.reset()
                    await self._poll(again)
            except TunneldError as error:
                self._view.problem = f"{error}; trying again"
                self._screen.draw()
                await self._wait(backoff.next_delay())

    async def _poll(self, client: Client) -> None:
        """Do that over one connection, until it is lost, which is shown."""
        while not self._view.ended:
            shown, asked_at = self._view.tunnel, trio.current_time()
            try:
                await self._kick(client)
                items = (await (client.call("show", shown) if shown else client.call("list"))).items
            except RefusedError as error:
                if error.reply_code != NoSuchTunnelError.code or not shown:
                    raise
                self._view.gone()
                continue
            except TunneldError as error:
                self._view.problem = f"{error}; trying again"
                self._screen.draw()
                return
            if self._view.tunnel == shown:
                self._view.update(trio.current_time(), items)
            self._screen.draw()
            await self._wait(asked_at + self._interval - trio.current_time(), shown)

    async def _kick(self, client: Client) -> None:
        """Disconnect the visitors that the user has confirmed; a refusal is shown."""
        while self._kicks:
            tunnel, visitor = self._kicks.pop(0)
            try:
                self._view.message = (await client.call("kick", tunnel, visitor)).text
            except RefusedError as error:
                self._view.message = str(error)

    async def _wait(self, seconds: float, shown: str | None = None) -> None:
        """Wait, but not once the user has quit, kicked a visitor or chosen something else to be shown."""
        with trio.move_on_after(max(0.0, seconds)):
            while not (self._view.ended or self._kicks or (shown is not None and self._view.tunnel != shown)):
                self._pressed = trio.Event()
                await self._pressed.wait()


async def _cancel_on_signal(signals: AsyncIterator[int], scope: trio.CancelScope) -> None:
    async for _ in signals:
        scope.cancel()
