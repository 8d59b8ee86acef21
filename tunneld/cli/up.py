"""`tunnel up`: run an agent for every exposure in a file until it is stopped.

    run
    ├─ writers               standard output, standard error
    ├─ signals               INT, TERM: drain, again: stop.  HUP: read the file again
    ├─ network monitor       see agent/network.py
    ├─ table                 on a terminal, see exposure_table.py
    ├─ probes                see probes.py
    └─ exposures             see agent/exposures.py

The exit status after a signal is 0, or that of the first exposure that failed permanently.
"""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import trio

from tunneld.agent.access import RelayAccess
from tunneld.agent.config import Changes, ExposureConfig, conflict
from tunneld.agent.events import Activity, Reporter
from tunneld.agent.expose_file import ExposeFile, load_plans
from tunneld.agent.exposures import Exposures, ExposureSpec
from tunneld.agent.network import NetworkMonitor
from tunneld.agent.status import AgentStatus
from tunneld.cli.access import access, add_relay_options, from_terminal
from tunneld.cli.board import Board
from tunneld.cli.common import Parser, say, status_of
from tunneld.cli.expose import STOPPED_BY_SIGNAL, prepare
from tunneld.cli.exposure_table import ExposureTable
from tunneld.cli.output import AgentOutput, line_reporter, open_output
from tunneld.cli.probes import open_probes
from tunneld.cli.reporters import TableReporter
from tunneld.config.places import user_file
from tunneld.errors import ConfigError, TunneldError, UsageError

FILE = "expose.toml"
CONTROLLING_TERMINAL = "/dev/tty"
"""The terminal of the session of whichever process opens it, see tty(4)."""


@dataclass(frozen=True, slots=True)
class RelayConfig:
    """Access to the relay as of the last reading of the file, and the inputs it was made from."""

    access: RelayAccess
    table: Mapping[str, Any]
    tls_files: tuple[bytes, ...]  # contents of the certificate and key files


class ExposureSource:
    """The configuration file of `tunnel up`, read at the start and at each reload."""

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        """`names`: the exposures to serve; all in the file if empty."""
        self.path = path
        self._names = names
        self._relay: RelayConfig | None = None

    def read(self) -> dict[str, ExposureSpec]:
        """Read the file. Raises `ConfigError` or `UsageError`, and then the state is unchanged."""
        file = load_plans(self.path)
        chosen = select_exposures(file, self._names, self.path, strict=self._relay is None)
        if problem := conflict(chosen):
            raise ConfigError([f"{self.path}: {problem}"])
        self._relay = relay_config(file.relay, self._relay)
        return {name: ExposureSpec(config, self._relay.access) for name, config in chosen.items()}


async def run(options: argparse.Namespace) -> int:
    """Serve visitors until stopped. Returns the exit status."""
    source = ExposureSource(options.file or default_file(), options.names)
    specs = source.read()
    if options.check:
        say(f"{source.path}: ok")
        return os.EX_OK
    prepare()
    async with AsyncExitStack() as stack:
        until_hangup = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN  # not under nohup
        signals = stack.enter_context(trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
        output, table = await stack.enter_async_context(open_output(options)), ExposureTable()
        scope = stack.enter_context(trio.CancelScope())
        nursery = await stack.enter_async_context(trio.open_nursery())
        monitor = NetworkMonitor()
        status, schemes = AgentStatus(), {name: spec.config.scheme for name, spec in specs.items()}
        await stack.enter_async_context(open_probes(options, status, output, schemes))

        def new_reporter(name: str, config: ExposureConfig, activity: Callable[[], Activity]) -> Reporter:
            schemes[name] = config.scheme
            return status.observe(name, _new_reporter(options, output, table, name, config, activity), activity)

        exposures = Exposures(new_reporter, monitor)
        nursery.start_soon(monitor.run)
        nursery.start_soon(output.show, table, lambda _key: None)
        reload = partial(_reload, source, exposures, output.board, status)
        handle_signals = partial(_handle_signals, signals, exposures, scope, reload, until_hangup=until_hangup)
        nursery.start_soon(handle_signals)
        await exposures.run(specs)
        nursery.cancel_scope.cancel()
    return next(map(status_of, exposures.failures.values()), os.EX_OK)


def _new_reporter(
    options: argparse.Namespace,
    output: AgentOutput,
    table: ExposureTable,
    name: str,
    config: ExposureConfig,
    activity: Callable[[], Activity],
) -> Reporter:
    """The reporter of an exposure that fits the options and the terminal."""
    if output.is_live:
        return TableReporter(output.out, output.board, table, table.add(name, activity), config.scheme)
    return line_reporter(options, output, config.scheme, name)


def default_file() -> Path:
    """Return the file to read without `--file`. Raises `UsageError` if the user has no home directory."""
    path = user_file(FILE)
    if path is None:
        raise UsageError(f"no home directory to look for {FILE} in; use --file FILE")
    return path


def select_exposures(
    file: ExposeFile, names: Sequence[str], path: Path, *, strict: bool
) -> Mapping[str, ExposureConfig]:
    """Return the exposures with these names, or all of them if there are no names.

    Raises `UsageError` if `strict` and one is missing; otherwise a missing one is left out.
    """
    configs = file.plans
    missing = [name for name in names if name not in configs]
    if strict and missing:
        raise UsageError(f"{path} has no [expose.{missing[0]}]; it has {', '.join(configs)}")
    return {name: config for name, config in configs.items() if not names or name in names}


def relay_config(table: Mapping[str, Any], previous: RelayConfig | None) -> RelayConfig:
    """Make the access to the relay. Returns `previous` itself if nothing has changed, so that exposures compare equal.

    Raises `ConfigError`, `UsageError`. The user is asked for a secret only if there is no previous access.
    """
    parser = Parser()
    add_relay_options(parser)
    options = parser.parse_args([])  # only the environment
    given = {"relay" if key == "where" else key: value for key, value in table.items()}
    vars(options).update({key: str(value) if isinstance(value, Path) else value for key, value in given.items()})
    ask = from_terminal if previous is None else partial(_previous_secret, previous.access)
    made = access(options, "relay.{}".format, ask)
    tls_files = tuple(Path(name).read_bytes() for name in (options.ca, options.cert, options.key) if name)
    if previous is not None and (previous.table, previous.tls_files, previous.access.credential) == (
        table,
        tls_files,
        made.credential,
    ):
        return previous
    return RelayConfig(made, table, tls_files)


def _previous_secret(previous: RelayAccess, name: str) -> str:
    if previous.credential is None or previous.credential[0] != name:
        raise UsageError(f"no secret for the credential {name!r}: set relay.secret_file, or restart to be asked for it")
    return previous.credential[1]


def _reload(source: ExposureSource, exposures: Exposures, board: Board, status: AgentStatus) -> None:
    """Read the file again and apply it. If it has an error, that is printed and nothing changes."""
    try:
        changes = exposures.apply(source.read())
    except ConfigError as error:
        for problem in (*error.problems, f"{source.path}: not reloaded, nothing was changed"):
            board.notice(problem)
    except (TunneldError, OSError) as error:
        board.notice(f"{source.path}: not reloaded, nothing was changed: {error}")
    else:
        for name in changes.removed:
            status.forget(name)
        board.notice(f"{source.path}: reloaded: {summary(changes)}")


def summary(changes: Changes) -> str:
    """Format `opened a, b; closed c`, or `nothing changed`."""
    parts = (("opened", changes.added), ("closed", changes.removed), ("replaced", changes.replaced))
    return "; ".join(f"{what} {', '.join(names)}" for what, names in parts if names) or "nothing changed"


def has_terminal() -> bool:
    """Whether this process has a controlling terminal."""
    try:
        os.close(os.open(CONTROLLING_TERMINAL, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True


async def _handle_signals(
    signals: AsyncIterator[int],
    exposures: Exposures,
    scope: trio.CancelScope,
    reload: partial[None],
    *,
    until_hangup: bool,
) -> None:
    """Reload on HUP. Drain on the first other signal; cancel `scope` on the second, which cuts the visitors.

    HUP is also sent when the terminal of the agent goes away. With `until_hangup` it means to stop then, wherever the
    output goes.
    """
    on_terminal, is_draining = until_hangup and has_terminal(), False
    async for number in signals:
        if number == signal.SIGHUP and not (on_terminal and not has_terminal()):
            reload()
        elif is_draining:
            scope.cancel()
        else:
            is_draining = True
            exposures.drain(STOPPED_BY_SIGNAL)
