"""Goes through the steps inside the machine and says how each went; with --list says which there are, anywhere."""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Sequence

from tests.machine.inside.journal import JOURNAL
from tests.machine.inside.steps import Step, all_steps, chosen
from tests.machine.inside.tools import WrongError

LINES = 60
"""Of the journal, shown where a step failed."""


def main() -> int:
    """The exit status: 0 where all went well."""
    parser = argparse.ArgumentParser(prog="make machine ARGS=...")
    parser.add_argument("words", nargs="*", metavar="WORD", help="the steps whose names have one of these words")
    parser.add_argument("--from", dest="start", metavar="WORD", help="begin at the step whose name has this in it")
    parser.add_argument("--list", action="store_true", help="say which steps there are")
    parser.add_argument("--check", action="store_true", help="say whether there are such steps")
    options = parser.parse_args()
    try:
        steps = chosen(all_steps(), options.words, options.start)
    except ValueError as error:
        parser.error(str(error))
    if options.list:
        for step in steps:
            print(f"{step.name}\n    {step.what}")
    return 0 if options.list or options.check else _go_through(steps)


def _go_through(steps: Sequence[Step]) -> int:
    print(f"the machine is up after {time.monotonic():.0f} s; {len(steps)} steps", flush=True)
    outcomes: list[tuple[str, float, Step]] = []
    for number, step in enumerate(steps, 1):
        print(f"\n{number}/{len(steps)} {step.name}\n    {step.what}", flush=True)
        began = time.monotonic()
        outcome = _try(step)
        outcomes.append((outcome, time.monotonic() - began, step))
        print(f"    {outcome}, {outcomes[-1][1]:.0f} s", flush=True)
        if outcome != "ok" and step.is_first:
            break
    return _show_table(steps, outcomes)


def _try(step: Step) -> str:
    """Do it; `ok`, or `FAILED`, and then all is as it was before."""
    from tests.machine.inside.relay import put_back  # noqa: PLC0415 - what the steps have in hand, and they are wanted by name elsewhere

    began = time.monotonic()
    try:
        for remark in step.run() or ():
            for line in remark.splitlines():
                print(f"    {time.monotonic() - began:5.0f} s  {line}", flush=True)
    except Exception as error:
        print(f"    {error}" if isinstance(error, WrongError) else traceback.format_exc())
        print(*JOURNAL.tail(began, LINES), sep="\n")
        if not step.is_first:
            try:
                put_back()
            except WrongError as again:
                print(f"    could not put everything back: {again}")
        return "FAILED"
    return "ok"


def _show_table(steps: Sequence[Step], outcomes: Sequence[tuple[str, float, Step]]) -> int:
    print("\noutcome  seconds  step")
    for outcome, seconds, step in outcomes:
        print(f"{outcome:7}  {seconds:7.0f}  {step.name}")
    for step in steps[len(outcomes) :]:
        print(f"not tried         {step.name}")
    failed = len(steps) - sum(outcome == "ok" for outcome, _, _ in outcomes)
    print(f"in all   {sum(seconds for _, seconds, _ in outcomes):7.0f}")
    print("all steps passed" if not failed else f"{failed} of {len(steps)} steps failed", flush=True)
    return bool(failed)


sys.exit(main())
