"""Helpers of the steps: running commands, waiting, changing files."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

PATIENCE = 600.0
"""Seconds for everything that must happen. The machine is emulated, ten times slower than others or, if others use the
processor, a hundred times; and it may stand still for a minute. Nothing takes longer because of it but a failure.
"""
PATH = "/usr/local/bin:/usr/sbin:/usr/bin"


class WrongError(Exception):
    """A step found a wrong value."""


def expect(found: object, wanted: object, what: str) -> None:
    """Raise `WrongError` unless both values are equal."""
    if found != wanted:
        raise WrongError(f"{what}: {found!r}, not {wanted!r}")


def sh(command: str, *, status: int | None = 0, **variables: str) -> str:
    """Run a shell command; returns its output and errors. Raises `WrongError` for another exit status."""
    environment = {**os.environ, "PATH": PATH, **variables}
    try:
        done = subprocess.run(
            command, shell=True, stdout=-1, stderr=-2, text=True, check=False, timeout=PATIENCE, env=environment
        )
    except subprocess.TimeoutExpired as late:
        raise WrongError(f"{command}: not done in {PATIENCE:.0f} s: {late.stdout!r}") from None
    if status is not None and done.returncode != status:
        raise WrongError(f"{command}: exit status {done.returncode}: {done.stdout}")
    return done.stdout.strip()


def wait_until(what: str, happens: Callable[[], bool], *, every: float = 0.5) -> float:
    """Wait until a condition holds; returns the seconds it took. Raises `WrongError`."""
    began = time.monotonic()
    while not happens():
        if time.monotonic() - began > PATIENCE:
            raise WrongError(f"{what}: not within {PATIENCE:.0f} s")
        time.sleep(every)
    return time.monotonic() - began


@contextmanager
def changed(path: Path, text: str) -> Iterator[None]:
    """Replace the text of a file for the length of the block."""
    before = path.read_text()
    path.write_text(text)
    try:
        yield
    finally:
        path.write_text(before)
