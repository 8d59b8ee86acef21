"""Shared by both commands: the parser class, common options, output, exit statuses and error reporting.

A user error (a mistyped option, a missing file, a port in use, Ctrl-C) ends in one line on standard error and an exit
status of sysexits(3). A traceback always means a bug in tunneld.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from signal import SIGINT, SIGPIPE
from typing import TYPE_CHECKING, Any, NoReturn

from tunneld import __version__
from tunneld.errors import ConfigError, RefusedError, TunneldError, reason_of
from tunneld.log import PRIORITIES, is_journal

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

_PUMP = Path(__file__).parents[1] / "engine" / "pump"
COMPILED = any(_PUMP.with_suffix(suffix).exists() for suffix in EXTENSION_SUFFIXES)
"""Whether the data plane is compiled; see setup.py."""
BUILD = f"{__version__} (compiled)" if COMPILED else __version__
"""The version as `--version` prints it."""

SHELLS = ("bash", "zsh", "fish", "tcsh")
MAX_USAGE_LINES = 6
"""Lines of usage printed above an error; a longer usage is abbreviated."""
INTERRUPTED = 128 + SIGINT
"""The exit status after Ctrl-C, as a shell reports it."""


_MISTYPED = re.compile(r"(?:invalid choice: |unrecognized arguments: )'?(?P<word>[\w-]+)")
"""The errors of `argparse` about a word that it does not know."""


class OutputError(TunneldError):
    """Standard output cannot be written to, because the disk is full, for example."""

    exit_status = os.EX_IOERR


class OutputGoneError(OutputError):
    """The reader of standard output closed it (`tunneld --print-config | head -1`). This is not reported."""

    exit_status = 128 + SIGPIPE


class Parser(argparse.ArgumentParser):
    """`argparse` with exit status 64 for usage errors.

    The parser of a command may get its options only when they are needed: the options of twenty commands take most of
    the time in which `tunnel` starts.
    """

    filled_by: Callable[[Parser], None] | None = None
    """Adds the options, once."""

    def fill(self) -> None:
        """Add the options of this command, if that was put off."""
        fill, self.filled_by = self.filled_by, None
        if fill is not None:
            fill(self)

    def fill_all(self) -> None:
        """Do the same for all commands below this one."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                for command in action.choices.values():
                    command.fill()
                    command.fill_all()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """See `argparse`."""
        self.fill()
        return super().parse_known_args(args, namespace)

    def add_common_options(self) -> None:
        """Add `--version` and `--print-completion`. They belong to the command, not to its subcommands."""
        self.add_argument("--version", action="version", version=f"%(prog)s {BUILD}")
        self.add_argument(
            "--print-completion",
            action=_PrintCompletion,
            choices=SHELLS,
            metavar="SHELL",
            help=f"print a completion script for {', '.join(SHELLS)}",
        )

    def error(self, message: str) -> NoReturn:
        """Print the usage and the error, and exit with status 64."""
        complain(self._brief_usage(), end="")
        complain(_as_error(f"{self.prog}: {message}{self._hint(message)}"))
        raise SystemExit(os.EX_USAGE)

    def _hint(self, message: str) -> str:
        """The command or option that was probably meant, if one is similar."""
        found = _MISTYPED.search(message)
        if found is None:
            return ""
        import difflib  # noqa: PLC0415 - only mistakes need it

        known = [option for action in all_actions(self) for option in action.option_strings]
        if not found["word"].startswith("-"):
            known = [str(name) for action in self._actions for name in action.choices or ()]
        near = difflib.get_close_matches(found["word"], known, n=1)
        return f"; did you mean {near[0]}?" if near else ""

    def _brief_usage(self) -> str:
        """Format the usage, without options if there are so many that they would hide the error."""
        usage = self.format_usage()
        if usage.count("\n") <= MAX_USAGE_LINES:
            return usage
        arguments = " ".join(str(action.metavar) for action in self._actions if not action.option_strings)
        return f"usage: {self.prog} [OPTION ...] {arguments}\nrun `{self.prog} --help` for a list of options\n"

    def _print_message(self, message: str, file: SupportsWrite[str] | None = None) -> None:
        if file is None or file is sys.stdout:
            say(message, end="")
        else:
            complain(message, end="")


class _PrintCompletion(argparse.Action):
    """`--print-completion SHELL`."""

    def __call__(self, parser: argparse.ArgumentParser, _: object, shell: Any, option: str | None = None) -> NoReturn:
        from tunneld.cli.completion import script  # noqa: PLC0415 - 60 ms that only this option needs

        assert isinstance(parser, Parser)
        parser.fill_all()
        say(script(parser, shell))
        parser.exit()


def all_actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """The arguments and options of a parser, and of its commands as far as they have been filled."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from all_actions(inner)


def run(program: str, command: Callable[[], int]) -> int:
    """Run a command and return its exit status. An exception that ends it is reported on standard error."""
    hold_standard_descriptors()
    try:
        return command()
    except SystemExit:
        raise
    except BaseException as error:
        return _report(program, error)


@contextmanager
def on_interrupt(action: Callable[..., object] | signal.Handlers) -> Iterator[None]:
    """Set the action of SIGINT during the block, unless the parent process had it ignored.

    Python's own handler raises an exception in the code that is running. In a destructor or a callback of the garbage
    collector that exception is discarded, and Ctrl-C is lost. With SIG_DFL the kernel ends the process, which suits
    commands that have nothing to clean up.
    """
    former = signal.getsignal(SIGINT)
    if former is signal.SIG_IGN:
        yield
        return
    signal.signal(SIGINT, action)
    try:
        yield
    finally:
        signal.signal(SIGINT, former)


def printable(text: str) -> str:
    r"""Escape characters that do not print, such as controls and direction marks: `\n`, `\x1b`, `\u202e`.

    Text from a peer (a reason, a tunnel's name) must not move the cursor, forge lines or reprogram a terminal. Whatever
    `tunnel` and `tunneld` print passes through here: in `say`, `complain`, `Writer.put` and `Board`.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


_LAYOUT = {ord("\n"): None, ord("\t"): None}


def printable_lines(text: str) -> str:
    """Do the same for text that consists of lines, perhaps with tabs."""
    if text.translate(_LAYOUT).isprintable():
        return text
    return "\n".join("\t".join(map(printable, line.split("\t"))) for line in text.split("\n"))


def say(text: str, end: str = "\n") -> None:
    """Print to standard output and flush. Raises `OutputError`."""
    try:
        print(printable_lines(text), end=end, flush=True)
    except OSError as error:
        # The interpreter would write the rest of the buffer at exit and report the error again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        kind = OutputGoneError if isinstance(error, BrokenPipeError) else OutputError
        raise kind(f"could not write to standard output: {reason_of(error)}") from None


def complain(text: str, end: str = "\n") -> None:
    """Print to standard error. Does nothing if standard error cannot be written to."""
    if sys.stderr is None:
        return
    try:
        print(printable_lines(text), end=end, file=sys.stderr, flush=True)
    except OSError:
        return


def hold_standard_descriptors() -> None:
    """Open /dev/null for each closed standard descriptor. Otherwise a socket would get its number, and our output."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # open(2) returns the lowest free number, which is this one


def _report(program: str, error: BaseException) -> int:
    """Print why the command ended, and return the exit status."""
    leaves = list(leaves_of(error))
    ours = [leaf for leaf in leaves if isinstance(leaf, TunneldError)]
    if (missing := next((leaf for leaf in leaves if isinstance(leaf, ModuleNotFoundError)), None)) is not None:
        # The agent as a single file has only what an agent needs, and an extra may not be installed.
        complain(_as_error(f"{program}: this needs the Python module {missing.name}, which is not installed here"))
        complain(_as_error("  use a full installation of tunneld, with its extras: pip install 'tunneld[acme,dns]'"))
        return os.EX_UNAVAILABLE
    if any(not isinstance(leaf, TunneldError | KeyboardInterrupt) for leaf in leaves):
        complain(_as_error(f"{program}: internal error, please report it:\n{_traceback(error)}"), end="")
        return os.EX_SOFTWARE
    if not ours:
        return INTERRUPTED
    for line in _lines(program, ours):
        complain(_as_error(line))
    return status_of(ours[0])


def _as_error(text: str) -> str:
    """Mark each line with the priority of an error if standard error is the journal, for `journalctl -p err`."""
    if not is_journal(sys.stderr):
        return text
    return "".join(f"<{PRIORITIES['error']}>{line}" for line in text.splitlines(keepends=True))


def status_of(error: TunneldError) -> int:
    """Return the exit status of a command that this error ended."""
    return error.status if isinstance(error, RefusedError) else error.exit_status


def _lines(program: str, errors: Sequence[TunneldError]) -> Iterator[str]:
    for error in errors:
        match error:
            case OutputGoneError():
                continue
            case ConfigError():
                yield from error.problems  # each begins with its file, in the format of compilers that editors parse
            case _:
                yield printable(f"{program}: {error}")  # a relay's reason must not look like several lines


def leaves_of(error: BaseException) -> Iterator[BaseException]:
    """Yield the exceptions inside nested groups, which nurseries make."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from leaves_of(inner)
    else:
        yield error


def _traceback(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))
