"""The public interface: what its texts name can be imported, and programs on other frameworks are told what to do."""

from __future__ import annotations

import asyncio
import inspect
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import tunneld

ROOT = Path(__file__).parents[2]


def texts() -> Iterator[tuple[str, str]]:
    """The docstrings of the public names and their methods."""
    for name in tunneld.__all__:
        value = getattr(tunneld, name)
        yield name, inspect.getdoc(value) or ""
        if inspect.isclass(value) and not issubclass(value, Exception):
            for attribute, member in vars(value).items():
                if not attribute.startswith("_"):
                    yield f"{name}.{attribute}", inspect.getdoc(member) or ""


def test_every_name_is_described() -> None:
    assert [name for name, text in texts() if not text and name != "__version__"] == []


def test_every_exception_that_is_named_can_be_imported() -> None:
    named = {error for _, text in texts() for error in re.findall(r"`(\w+Error)`", text)}
    assert len(named) > 4
    assert named - {"OSError"} <= set(tunneld.__all__)


@pytest.mark.parametrize("name", ["connect", "visit", "open_listener"])
def test_asyncio_programs_are_told_what_to_do(name: str) -> None:
    arguments = {"connect": ("127.0.0.1:1",), "visit": ("127.0.0.1:1", "shell@alice"), "open_listener": (None,)}[name]

    async def use() -> None:
        async with getattr(tunneld, name)(*arguments):
            pass

    with pytest.raises(tunneld.UsageError, match=r"XML-RPC.*create_subprocess_exec.*start_guest_run"):
        asyncio.run(use())


def test_the_reference_can_be_built(tmp_path: Path) -> None:
    pytest.importorskip("pdoc", reason="pdoc is not installed")
    line = next(line for line in (ROOT / "Makefile").read_text().splitlines() if "-m pdoc" in line)
    arguments = shlex.split(line.replace("build/docs", str(tmp_path)))[1:]
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, capture_output=True, timeout=60)
    text = (tmp_path / "tunneld.html").read_text()
    assert [name for name in tunneld.__all__ if f'id="{name}"' not in text] == []
