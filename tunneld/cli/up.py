"""`tunnel up`: from a file to several exposures that run until they are told to stop, or the file says otherwise.

    run
    ├─ writers               standard output, standard error
    ├─ signals               INT, TERM: close the tunnels and end.  HUP: read the file again
    ├─ wake                  see agent/wake.py
    ├─ live lines            on a terminal
    └─ fleet                 see agent/fleet.py

Ending because somebody said so is success, unless an exposure failed for good: the exit status is
that of the first.
"""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio

from tunneld.agent.access import RelayAccess
from tunneld.agent.config import Changes, ExposureConfig
from tunneld.agent.expose_file import ExposeFile, RelayTable, load_plans
from tunneld.agent.exposures import Exposures, ExposureSpec
from tunneld.agent.network import NetworkMonitor
from tunneld.cli.access import access, add_relay_options, from_terminal
from tunneld.cli.board import Board, Writer
from tunneld.cli.common import Parser, say, status_of
from tunneld.cli.expose import STDERR, STDOUT, TOLD, prepare, teller_of
from tunneld.config.places import user_file
from tunneld.errors import ConfigError, TunneldError, UsageError
from tunneld.tls.pins import parse_pins

FILE = "expose.toml"


@dataclass(frozen=True, slots=True)
class Reach:
    """How the relay was reached when the file was last read, and all that this was made of."""

    access: RelayAccess
    table: RelayTable
    papers: tuple[bytes, ...]  # what the files of certificates and keys held


class WantedFile:
    """The file, and what it last said."""

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        """`names`: of the exposures that are wanted of those in the file; none for all of them."""
        self.path = path
        self._names = names
        self._reach: Reach | None = None

    def read(self) -> dict[str, ExposureSpec]:
        """Read the file again. Raises `ConfigError`, `UsageError`; then nothing changed."""
        file = load_plans(self.path)
        chosen = chosen_of(file, self._names, self.path, strict=self._reach is None)
        self._reach = reach_of(file.relay, self._reach)
        return {name: ExposureSpec(plan, self._reach.access) for name, plan in chosen.items()}


async def run(options: argparse.Namespace) -> int:
    """Expose until told to stop. Returns the exit status."""
    wanted = WantedFile(options.file or default_file(), options.names)
    berths = wanted.read()
    if options.check:
        say(f"{wanted.path}: ok")
        return os.EX_OK
    prepare()
    async with AsyncExitStack() as stack:
        signals = stack.enter_context(trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
        out = await stack.enter_async_context(Writer(STDOUT, vital=True).open())
        err = await stack.enter_async_context(Writer(STDERR, vital=False).open())
        scope = stack.enter_context(trio.CancelScope())
        nursery = await stack.enter_async_context(trio.open_nursery())
        board, wake = Board(err), NetworkMonitor()
        fleet = Exposures(
            lambda name, plan, figures: teller_of(options, out, err, plan.scheme, name, board=board, figures=figures),
            wake,
        )
        nursery.start_soon(wake.run)
        nursery.start_soon(board.run)
        nursery.start_soon(_obey, signals, fleet, scope, partial(_reload, wanted, fleet, board))
        await fleet.run(berths)
        nursery.cancel_scope.cancel()
    return next(map(status_of, fleet.failures.values()), os.EX_OK)


def default_file() -> Path:
    """The file that is read when none is named. Raises `UsageError` where there is no place for it."""
    path = user_file(FILE)
    if path is None:
        raise UsageError(f"no home to look for {FILE} in: name it with --file")
    return path


def chosen_of(file: ExposeFile, names: Sequence[str], path: Path, *, strict: bool) -> Mapping[str, ExposureConfig]:
    """The plans of those names, or of all where there are no names. Raises `UsageError` if `strict` and one is not
    there; else it is left out.
    """
    plans = file.plans
    missing = [name for name in names if name not in plans]
    if strict and missing:
        raise UsageError(f"{path} has no [expose.{missing[0]}]; it has {', '.join(plans)}")
    return {name: plan for name, plan in plans.items() if not names or name in names}


def reach_of(table: RelayTable, former: Reach | None) -> Reach:
    """The way to the relay; the former one where nothing about it changed, so that exposures can be told alike.

    Raises `ConfigError`, `UsageError`. Somebody is asked for a secret at most once, when there is no former way.
    """
    parser = Parser()
    add_relay_options(parser)
    options = parser.parse_args([])  # what the environment says
    given = table.model_dump(exclude_none=True)
    given["relay"] = given.pop("where", options.relay)
    if table.pin is not None:
        given["pin"] = parse_pins(table.pin)
    vars(options).update({key: str(value) if isinstance(value, Path) else value for key, value in given.items()})
    made = access(options, "relay.{}".format, from_terminal if former is None else partial(_remembered, former.access))
    papers = tuple(Path(name).read_bytes() for name in (options.ca, options.cert, options.key) if name)
    same = former is not None and (former.table, former.papers, former.access.credential) == (
        table,
        papers,
        made.credential,
    )
    return former if former is not None and same else Reach(made, table, papers)


def _remembered(former: RelayAccess, name: str) -> str:
    if former.credential is None or former.credential[0] != name:
        raise UsageError(f"no secret for the credential {name!r}: give relay.secret_file, or start again to be asked")
    return former.credential[1]


def _reload(wanted: WantedFile, fleet: Exposures, board: Board) -> None:
    """Read the file again and apply it; a file that cannot be used changes nothing, and is complained about."""
    try:
        made = fleet.apply(wanted.read())
    except ConfigError as error:
        for problem in (*error.problems, f"{wanted.path}: not reloaded, nothing was changed"):
            board.notice(problem)
    except (TunneldError, OSError) as error:
        board.notice(f"{wanted.path}: not reloaded, nothing was changed: {error}")
    else:
        board.notice(f"{wanted.path}: reloaded: {summary(made)}")


def summary(made: Changes) -> str:
    """`opened a, b; closed c`, or `nothing changed`."""
    parts = (("opened", made.added), ("closed", made.removed), ("replaced", made.replaced))
    return "; ".join(f"{what} {', '.join(names)}" for what, names in parts if names) or "nothing changed"


async def _obey(signals: AsyncIterator[int], fleet: Exposures, scope: trio.CancelScope, reload: partial[None]) -> None:
    """HUP also comes when the terminal that we were started on is gone, and then it means the end. The first word of
    that lets visitors finish, the second cuts them.
    """
    on_terminal, told = os.isatty(STDERR), False
    async for number in signals:
        if number == signal.SIGHUP and not (on_terminal and not os.isatty(STDERR)):
            reload()
        elif told:
            scope.cancel()
        else:
            told = True
            fleet.drain(TOLD)
