"""`tunnel expose`: run an agent for one local server until it is stopped.

    run
    ├─ writers               standard output, standard error
    ├─ signals               INT, TERM, HUP: drain, again: stop
    ├─ network monitor       see agent/network.py
    ├─ panel                 on a terminal, see panel.py
    ├─ probes                see probes.py
    ├─ engine                all data of visitors, see engine/
    └─ exposure              see agent/expose.py

The exit status is 0 after a signal and after the end of `--ttl`.
"""

from __future__ import annotations

import argparse
import gc
import os
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import trio

from tunneld import log
from tunneld.agent.config import plan_of
from tunneld.agent.events import Activity, Reporter
from tunneld.agent.expose import Exposure, open_exposure
from tunneld.agent.folder import folder_of, serving_folder
from tunneld.agent.network import NetworkMonitor
from tunneld.agent.relay_connection import RelayConnection
from tunneld.agent.status import AgentStatus
from tunneld.cli.access import access, as_option
from tunneld.cli.agent_log import print_line
from tunneld.cli.common import leaves_of, status_of
from tunneld.cli.output import AgentOutput, line_reporter, open_output
from tunneld.cli.panel import Panel
from tunneld.cli.probes import open_probes
from tunneld.cli.reporters import CodeReporter, LineReporter, PanelReporter
from tunneld.engine import new_engine
from tunneld.engine.limits import POLL_TIMEOUT
from tunneld.errors import TunneldError, UsageError
from tunneld.net.sockets import raise_descriptor_limit

STOPPED_BY_SIGNAL = "told to stop"
"""The reason in the `closed` event of a tunnel that a signal ended."""


async def run(options: argparse.Namespace) -> int:
    """Serve visitors until stopped by a signal, a limit or the relay. Returns the exit status, or raises."""
    reporters: list[Reporter] = []
    try:
        await _serve(options, reporters)
    except (TunneldError, ExceptionGroup) as error:
        status = _status_of_said(error, reporters)
        if status is None:
            raise
        return status
    return os.EX_OK


def _status_of_said(error: Exception, reporters: list[Reporter]) -> int | None:
    """The exit status, if the closing message has said why the exposure ended; None if the reason is to be printed."""
    said = [reporter.closed_for for reporter in reporters if isinstance(reporter, LineReporter)]
    match list(leaves_of(error)):
        case [TunneldError() as reason] if str(reason) in said:
            return status_of(reason)
    return None


async def _serve(options: argparse.Namespace, reporters: list[Reporter]) -> None:
    """Do that; the reporter is added to `reporters` for the time after."""
    folder = folder_of(options.target)
    if folder is not None:
        async with serving_folder(folder) as target:
            scheme = "http" if options.scheme in {None, "tcp"} else options.scheme
            vars(options).update(target=target, scheme=scheme)
            await _expose(options, reporters, str(folder))
        return
    await _expose(options, reporters, options.target)


async def _expose(options: argparse.Namespace, reporters: list[Reporter], shown: str) -> None:
    """Expose a local server, which is `shown` as this."""
    config, relay_access = plan_of(vars(options), as_option), access(options)
    if options.qr and (options.json or options.quiet):
        raise UsageError(f"--qr cannot be combined with {'--json' if options.json else '--quiet'}")
    prepare()
    async with AsyncExitStack() as stack:
        signals = stack.enter_context(trio.open_signal_receiver(*signals_to_handle()))
        output = await stack.enter_async_context(open_output(options))
        current: list[Exposure] = []  # empty until the exposure is open

        def activity() -> Activity:
            return current[0].activity if current else Activity()

        panel = Panel(
            shown if config.target.path else str(config.target),
            relay_access.where,
            activity,
            keys=output.has_keys,
            show_code=options.qr,
            colours=output.board.colours,
        )
        reporters.append(_reporter(options, output, config.scheme, panel))
        status = AgentStatus()
        reporter = status.observe("", reporters[0], activity)
        await stack.enter_async_context(open_probes(options, status, output, {"": config.scheme}))
        scope = stack.enter_context(trio.CancelScope())
        nursery = await stack.enter_async_context(trio.open_nursery())
        monitor, engine = NetworkMonitor(), new_engine(poll_timeout=POLL_TIMEOUT)
        relay = RelayConnection(relay_access, monitor)
        nursery.start_soon(monitor.run)
        nursery.start_soon(relay.run)
        await nursery.start(engine.run)
        async with open_exposure(config, relay, reporter, engine, monitor) as exposure:
            current.append(exposure)
            nursery.start_soon(_handle_signals, signals, exposure, config.drain_timeout, scope)
            nursery.start_soon(output.show, panel, panel.on_key)
            await exposure.run()
        nursery.cancel_scope.cancel()


def prepare() -> None:
    """Set up logging, the descriptor limit and the garbage collector of a process that serves visitors."""
    log.send_to(print_line)
    raise_descriptor_limit()
    gc.freeze()  # scanning the modules for garbage would stop all relays for some milliseconds


def _reporter(options: argparse.Namespace, output: AgentOutput, scheme: str, panel: Panel) -> Reporter:
    """The reporter that fits the options and the terminal."""
    if output.is_live:
        return PanelReporter(output.out, output.board, panel, scheme)
    if options.qr:
        return CodeReporter(output.out, output.err, scheme)
    return line_reporter(options, output, scheme)


def signals_to_handle() -> list[signal.Signals]:
    """Return INT, TERM, and HUP unless it is ignored, as under `nohup`."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM] + ([] if ignored else [signal.SIGHUP])


async def _handle_signals(
    signals: AsyncIterator[int], exposure: Exposure, drain_timeout: float, scope: trio.CancelScope
) -> None:
    """Drain on the first signal; cancel `scope` on the second, which cuts the visitors."""
    is_draining = False
    async for _ in signals:
        if is_draining:
            scope.cancel()
        exposure.drain(STOPPED_BY_SIGNAL, drain_timeout)
        is_draining = True
