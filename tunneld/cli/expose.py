"""`tunnel expose`: from the options to an agent that runs until it is told to stop.

    run
    ├─ writers               standard output, standard error
    ├─ signals               INT, TERM, HUP: close the tunnel and end
    ├─ live line             on a terminal
    └─ exposure              see agent/expose.py

Ending because somebody said so is success: the exit status is 0 after a signal and after the end of `--ttl`.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import structlog
import trio

from tunneld.agent.events import Teller
from tunneld.agent.expose import open_exposure
from tunneld.agent.health import Check, Conduct
from tunneld.agent.keeper import Wish
from tunneld.agent.sizing import Limits
from tunneld.agent.wake import Wake
from tunneld.cli.access import access
from tunneld.cli.tellers import JsonLines, Lines, Live, Quiet
from tunneld.cli.writer import Writer
from tunneld.endpoint import Target
from tunneld.errors import UsageError
from tunneld.net import raise_descriptor_limit
from tunneld.wire.lines import Value

STDOUT, STDERR = 1, 2
WARNING = 30  # of `logging`: the engine says nothing lower that concerns a person


VISITORS = ("allow_from", "deny_from", "max_visitors", "max_per_source", "visitor_rate", "bandwidth", "quota")
"""Options of openTunnel that go to the relay as they were typed; it says what is wrong with them."""


async def run(options: argparse.Namespace) -> int:
    """Expose until told to stop. Returns the exit status 0; anything else is an exception."""
    target, relay, wish = Target.parse(options.target), access(options), wish_of(options)
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(WARNING),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    raise_descriptor_limit()
    async with AsyncExitStack() as stack:
        signals = stack.enter_context(trio.open_signal_receiver(*signals_to_obey()))
        out = await stack.enter_async_context(Writer(STDOUT, vital=True).open())
        err = await stack.enter_async_context(Writer(STDERR, vital=False).open())
        teller = teller_of(options, out, err)
        scope = stack.enter_context(trio.CancelScope())
        nursery = await stack.enter_async_context(trio.open_nursery())
        nursery.start_soon(_stop_on_signal, signals, scope)
        wake = Wake()
        nursery.start_soon(wake.run)
        async with open_exposure(
            target, relay, wish, teller, linger=options.linger, check=check_of(options), wake=wake
        ) as exposure:
            if isinstance(teller, Live):
                nursery.start_soon(teller.run, lambda: exposure.figures)
            await exposure.run()
        nursery.cancel_scope.cancel()
    return os.EX_OK


def wish_of(options: argparse.Namespace) -> Wish:
    """The kind of tunnel that the options ask for. Raises `UsageError`."""
    if options.pool > options.max_pool:
        raise UsageError(f"--pool {options.pool} is more than --max-pool {options.max_pool}")
    words: dict[str, Value] = {
        "name": options.name,
        "client_port": options.port,
        "ttl": options.ttl,
        "idle_timeout": options.idle_timeout,
        "linger": options.linger,
        **{key: getattr(options, key) for key in VISITORS},
    }
    asked = {key: value for key, value in words.items() if value is not None}
    limits = Limits(options.pool, options.max_pool)
    return Wish(asked, limits, keep_header=options.proxy_protocol, backend=options.backend)


def check_of(options: argparse.Namespace) -> Check | None:
    """How the local server is to be looked at, if at all."""
    if options.health is None:
        return None
    return Check(
        options.health,
        options.health_path,
        options.health_interval,
        options.health_timeout,
        conduct=Conduct(options.unhealthy),
    )


def teller_of(options: argparse.Namespace, out: Writer, err: Writer) -> Teller:
    """Who talks: see tellers.py."""
    scheme = options.scheme or "tcp"
    if options.json:
        return JsonLines(out, scheme)
    if options.quiet:
        return Quiet(out, err, scheme)
    moves = sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    return (Live if moves else Lines)(out, err, scheme)


def signals_to_obey() -> list[signal.Signals]:
    """INT, TERM, and HUP unless `nohup` started us."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM] + ([] if ignored else [signal.SIGHUP])


async def _stop_on_signal(signals: AsyncIterator[int], scope: trio.CancelScope) -> None:
    async for _ in signals:
        scope.cancel()
