"""Work that takes long, in steps, so that its caller can do other things between them. Pure."""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeAlias, TypeVar

Result = TypeVar("Result")

Steps: TypeAlias = Generator[int, None, Result]
"""Yields after each step the octets that it processed, and returns the result."""

PIECE = 16 * 1024
"""Octets of one step: classic encryption takes 0.7 ms for them."""


def finish(steps: Steps[Result]) -> Result:
    """Take all steps at once."""
    try:
        while True:
            next(steps)
    except StopIteration as done:
        result: Result = done.value
        return result
