"""The steps, in their order: each is a function whose name is its sentence, and may yield remarks.

One that finds something else than it should raises `WrongError`; the next one is tried all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

Run = Callable[[], Iterator[str] | None]


@dataclass(frozen=True)
class Step:
    """What to do, and whether others build on it."""

    run: Run
    always: bool


STEPS: dict[str, Step] = {}


def step(run: Run) -> Run:
    """Make it one of `STEPS`."""
    STEPS[run.__name__.replace("_", " ")] = Step(run, always=False)
    return run


def always(run: Run) -> Run:
    """A step that is not left out."""
    STEPS[run.__name__.replace("_", " ")] = Step(run, always=True)
    return run
