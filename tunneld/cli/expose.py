"""`tunnel expose`: from the options to an agent that runs until it is told to stop.

    run
    ├─ writers               standard output, standard error
    ├─ signals               INT, TERM, HUP: close the tunnel and end
    ├─ wake                  see agent/wake.py
    ├─ live line             on a terminal
    ├─ engine                every byte of all visitors, see relay/
    └─ exposure              see agent/expose.py

Ending because somebody said so is success: the exit status is 0 after a signal and after the end of `--ttl`.
"""

from __future__ import annotations

import argparse
import gc
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack

import structlog
import trio

from tunneld.agent.config import plan_of
from tunneld.agent.events import Reporter, Stats
from tunneld.agent.expose import Exposure, open_exposure
from tunneld.agent.network import NetworkMonitor
from tunneld.cli.access import access, as_option
from tunneld.cli.board import Board, Writer
from tunneld.cli.reporters import JsonReporter, LineReporter, LiveReporter, QuietReporter
from tunneld.engine import new_engine
from tunneld.engine.limits import POLL_TIMEOUT
from tunneld.net.sockets import raise_descriptor_limit

STDOUT, STDERR = 1, 2
WARNING = 30  # of `logging`: the engine says nothing lower that concerns a person


TOLD = "told to stop"


async def run(options: argparse.Namespace) -> int:
    """Expose until told to stop. Returns the exit status 0; anything else is an exception."""
    plan, relay = plan_of(vars(options), as_option), access(options)
    prepare()
    async with AsyncExitStack() as stack:
        signals = stack.enter_context(trio.open_signal_receiver(*signals_to_obey()))
        out = await stack.enter_async_context(Writer(STDOUT, vital=True).open())
        err = await stack.enter_async_context(Writer(STDERR, vital=False).open())
        board = Board(err)
        current: list[Exposure] = []  # one, once it is there

        def figures() -> Stats:
            return current[0].stats if current else Stats()

        teller = teller_of(options, out, err, plan.scheme, board=board, figures=figures)
        scope = stack.enter_context(trio.CancelScope())
        nursery = await stack.enter_async_context(trio.open_nursery())
        wake, engine = NetworkMonitor(), new_engine(poll_timeout=POLL_TIMEOUT)
        nursery.start_soon(wake.run)
        await nursery.start(engine.run)
        async with open_exposure(plan, relay, teller, engine, wake) as exposure:
            current.append(exposure)
            nursery.start_soon(_end_on_signals, signals, exposure, plan.drain_timeout, scope)
            nursery.start_soon(board.run)
            await exposure.run()
        nursery.cancel_scope.cancel()
    return os.EX_OK


def prepare() -> None:
    """What a process that serves visitors needs before it begins."""
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(WARNING),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    raise_descriptor_limit()
    gc.freeze()  # the modules stay: looking them through for garbage stops everybody for some milliseconds


def teller_of(
    options: argparse.Namespace,
    out: Writer,
    err: Writer,
    scheme: str,
    name: str = "",
    *,
    board: Board,
    figures: Callable[[], Stats],
) -> Reporter:
    """Who talks: see tellers.py."""
    if options.json:
        return JsonReporter(out, scheme, name)
    if options.quiet:
        return QuietReporter(out, err, scheme, name)
    if sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        return LiveReporter(out, board, scheme, name, figures=figures)
    return LineReporter(out, err, scheme, name)


def signals_to_obey() -> list[signal.Signals]:
    """INT, TERM, and HUP unless `nohup` started us."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM] + ([] if ignored else [signal.SIGHUP])


async def _end_on_signals(
    signals: AsyncIterator[int], exposure: Exposure, drain_timeout: float, scope: trio.CancelScope
) -> None:
    """The first lets visitors finish, the second cuts them."""
    told = False
    async for _ in signals:
        if told:
            scope.cancel()
        exposure.drain(TOLD, drain_timeout)
        told = True
