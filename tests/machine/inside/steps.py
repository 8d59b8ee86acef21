"""The steps in their order. Each is a function: its name is a sentence, its docstring describes it in detail, and it
yields remarks.

A step that fails raises `WrongError`. Then the state after the first steps is restored and the next step runs. But if
one of the first steps fails, no further step runs, since all of them depend on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module

MODULES = ("relay", "agents", "reloads", "restarts", "deaths", "sockets", "troubles")
"""The modules with steps, in their order."""

Run = Callable[[], Iterator[str] | None]


@dataclass(frozen=True, slots=True)
class Step:
    """A step, and whether other steps depend on it."""

    run: Run
    is_first: bool

    @property
    def name(self) -> str:
        """The name as a sentence."""
        return self.run.__name__.replace("_", " ")

    @property
    def what(self) -> str:
        """The docstring on one line."""
        return " ".join((self.run.__doc__ or "").split())


_found: list[Step] = []


def step(run: Run) -> Run:
    """Register a step."""
    _found.append(Step(run, is_first=False))
    return run


def first(run: Run) -> Run:
    """Register a step that always runs, since others depend on it."""
    _found.append(Step(run, is_first=True))
    return run


def all_steps() -> Sequence[Step]:
    """Return the steps that others depend on, then the rest."""
    for module in MODULES:
        import_module(f"{__package__}.{module}")
    return sorted(_found, key=lambda step: not step.is_first)


def chosen(steps: Sequence[Step], words: Sequence[str], start: str | None) -> list[Step]:
    """Return the steps that others depend on and, from the first one with `start` in its name, those with one of the
    words in their name, or all if there are no words.

    Raises `ValueError` if a word is in no name.
    """
    for word in [*words, *([start] if start else [])]:
        if not any(word in step.name for step in steps):
            raise ValueError(f"no step has {word!r} in its name; make machine ARGS=--list shows them")
    names = [step.name for step in steps]
    begin = next((names.index(name) for name in names if start and start in name), 0)
    return [
        step
        for number, step in enumerate(steps)
        if step.is_first or (number >= begin and (not words or any(word in step.name for word in words)))
    ]
