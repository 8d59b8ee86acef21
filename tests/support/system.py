"""What a test needs of the machine and may not find there: the test is skipped with a reason that names it.

Where `TUNNELD_REQUIRE_PROGRAMS` is set, as CI does, the test fails instead: no skip hides what CI is to test.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import NoReturn

import pytest

PLACES = ["/usr/sbin", "/sbin", *map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True))]
"""Where programs live beside PATH."""


def find_program(name: str) -> str:
    """The path of a system program."""
    path = shutil.which(name, path=":".join([os.environ.get("PATH", ""), *PLACES]))
    return path or lacking(f"{name} is not installed")


def lacking(reason: str) -> NoReturn:
    """Skip the test, or fail it where the run requires everything."""
    if os.environ.get("TUNNELD_REQUIRE_PROGRAMS"):
        pytest.fail(f"{reason}, and this run requires it")
    pytest.skip(reason)


def only_skip(group: BaseExceptionGroup[BaseException]) -> BaseException | None:
    """The skip in a group that holds nothing else: what a nursery makes of one that was raised in its block."""
    first: BaseException | None = None
    for error in group.exceptions:
        each = only_skip(error) if isinstance(error, BaseExceptionGroup) else error
        if not isinstance(each, pytest.skip.Exception):
            return None
        first = each
    return first
