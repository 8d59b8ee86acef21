"""What both commands share: options that every command has, exit statuses, and the end of everything as a sentence.

A person who mistypes, names a missing file, asks for a port that is taken, or presses Ctrl-C sees one line and an exit
status of sysexits(3). A traceback means a bug of ours, and only a bug.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from signal import SIGINT, SIGPIPE
from typing import TYPE_CHECKING, Any, NoReturn

from tunneld.cli.build import BUILD
from tunneld.errors import ConfigError, RefusedError, TunneldError, reason_of

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

SHELLS = ("bash", "zsh", "tcsh")
LONGEST_USAGE = 6
"""Lines of what is said about a mistake before the mistake."""
INTERRUPTED = 128 + SIGINT  # as a shell reports it


class OutputError(TunneldError):
    """Standard output cannot be written to: the disk behind it is full, say."""

    exit_status = os.EX_IOERR


class OutputGoneError(OutputError):
    """Whoever read our standard output has seen enough (`tunneld --print-config | head -1`): no reason to complain."""

    exit_status = 128 + SIGPIPE


class Parser(argparse.ArgumentParser):
    """`argparse` that does not guess at options, exits with 64 on a usage error, and knows what all commands have."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False} | options)

    def add_common_options(self) -> None:
        """The options of a whole command; a verb's own parser has no use for them."""
        self.add_argument("--version", action="version", version=f"%(prog)s {BUILD}")
        self.add_argument(
            "--print-completion",
            action=_PrintCompletion,
            choices=SHELLS,
            metavar="SHELL",
            help=f"print a completion script for {', '.join(SHELLS)}",
        )

    def error(self, message: str) -> NoReturn:
        """Say how it is written, and what is wrong with what was."""
        complain(self._brief_usage(), end="")
        complain(_grave(f"{self.prog}: {message}"))
        raise SystemExit(os.EX_USAGE)

    def _brief_usage(self) -> str:
        """How it is written; where there are too many options to see a mistake for them, without those."""
        usage = self.format_usage()
        if usage.count("\n") <= LONGEST_USAGE:
            return usage
        arguments = " ".join(str(action.metavar) for action in self._actions if not action.option_strings)
        return f"usage: {self.prog} [OPTION ...] {arguments}\nwhich options there are: {self.prog} --help\n"

    def _print_message(self, message: str, file: SupportsWrite[str] | None = None) -> None:
        if file is None or file is sys.stdout:
            say(message, end="")
        else:
            complain(message, end="")


class _PrintCompletion(argparse.Action):
    """`--print-completion SHELL`: written by shtab from the parser itself, so it never lags behind."""

    def __call__(self, parser: argparse.ArgumentParser, _: object, shell: Any, option: str | None = None) -> NoReturn:
        import shtab  # noqa: PLC0415 - 60 ms that only this option needs

        for action in _actions(parser):
            if action.metavar == "FILE":
                vars(action)["complete"] = shtab.FILE
        say(shtab.complete(parser, shell))
        parser.exit()


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from _actions(inner)


def run(program: str, command: Callable[[], int]) -> int:
    """Run a command and return its exit status; what ends it early is said on standard error."""
    hold_standard_descriptors()
    try:
        return command()
    except SystemExit:
        raise
    except BaseException as error:
        return _end(program, error)


@contextmanager
def on_interrupt(action: Callable[..., object] | signal.Handlers) -> Iterator[None]:
    """While the block runs SIGINT does this, unless whoever started us had it ignored.

    As Python has it, an exception comes out of whatever runs at that moment, and where that was called by nobody (to
    forget an object, say) it is lost, and so is Ctrl-C. With SIG_DFL the kernel ends the process: for those who have
    nothing to put in order.
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


def say(text: str, end: str = "\n") -> None:
    """Print to standard output, now. Raises `OutputError`."""
    try:
        print(text, end=end, flush=True)
    except OSError as error:
        # What is left in the buffer would be tried again, and complained about, when the interpreter exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        kind = OutputGoneError if isinstance(error, BrokenPipeError) else OutputError
        raise kind(f"could not write to standard output: {reason_of(error)}") from None


def complain(text: str, end: str = "\n") -> None:
    """Print to standard error, if there is one."""
    if sys.stderr is None:
        return
    try:
        print(text, end=end, file=sys.stderr, flush=True)
    except OSError:
        return


def hold_standard_descriptors() -> None:
    """Open /dev/null where a standard descriptor is closed: else a socket gets its number, and our messages."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # open(2) gives the lowest free number, which is this one


def _end(program: str, error: BaseException) -> int:
    """Say why it ended, and give the exit status."""
    leaves = list(_leaves(error))
    ours = [leaf for leaf in leaves if isinstance(leaf, TunneldError)]
    if any(not isinstance(leaf, TunneldError | KeyboardInterrupt) for leaf in leaves):
        complain(_grave(f"{program}: internal error, please report it:\n{_traceback(error)}"), end="")
        return os.EX_SOFTWARE
    if not ours:
        return INTERRUPTED
    for line in _lines(program, ours):
        complain(_grave(line))
    return status_of(ours[0])


def _grave(text: str) -> str:
    """As the journal wants errors, where standard error leads there: `journalctl -p err` finds why nothing runs."""
    from tunneld.daemon.log.lines import PRIORITIES, is_journal  # noqa: PLC0415 - 30 ms, and who is well has no need of it

    if not is_journal(sys.stderr):
        return text
    return "".join(f"<{PRIORITIES['error']}>{line}" for line in text.splitlines(keepends=True))


def status_of(error: TunneldError) -> int:
    """The exit status of a command that ended by this."""
    return error.status if isinstance(error, RefusedError) else error.exit_status


def _lines(program: str, errors: Sequence[TunneldError]) -> Iterator[str]:
    for error in errors:
        match error:
            case OutputGoneError():
                continue
            case ConfigError():
                yield from error.problems  # each begins with its file, as compilers say it and editors read it
            case _:
                yield f"{program}: {error}"


def _leaves(error: BaseException) -> Iterator[BaseException]:
    """The exceptions inside the groups that nurseries make."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error


def _traceback(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))
