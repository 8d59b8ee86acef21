"""The steps, in their order: each is a function whose name is its sentence and whose docstring says what it does; what
it yields are remarks.

One that finds something else than it should raises `WrongError`. Then everything is put back as the first steps left
it, and the next one is tried all the same; but where one of the first ones fails, nothing that builds on it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module

MODULES = ("relay", "agents", "reloads", "restarts", "deaths", "sockets", "troubles")
"""Where the steps are, in their order."""

Run = Callable[[], Iterator[str] | None]


@dataclass(frozen=True, slots=True)
class Step:
    """What to do, and whether others build on it."""

    run: Run
    is_first: bool

    @property
    def name(self) -> str:
        """Its sentence."""
        return self.run.__name__.replace("_", " ")

    @property
    def what(self) -> str:
        """What it does."""
        return " ".join((self.run.__doc__ or "").split())


_found: list[Step] = []


def step(run: Run) -> Run:
    """Make it one of the steps."""
    _found.append(Step(run, is_first=False))
    return run


def first(run: Run) -> Run:
    """A step that is not left out."""
    _found.append(Step(run, is_first=True))
    return run


def all_steps() -> Sequence[Step]:
    """Those on which others build, then the others."""
    for module in MODULES:
        import_module(f"{__package__}.{module}")
    return sorted(_found, key=lambda step: not step.is_first)


def chosen(steps: Sequence[Step], words: Sequence[str], start: str | None) -> list[Step]:
    """Those on which others build; and of the others, from the one on whose name has `start` in it, those whose name
    has one of the words, or all where there are none.

    Raises `ValueError` where a word is in no name.
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
