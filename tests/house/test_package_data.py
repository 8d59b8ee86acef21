"""What a wheel has besides Python: pages and the like must be named in pyproject.toml, or only a checkout has them."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "tunneld"
MADE_HERE = {".py", ".pyc", ".so"}
"""Endings of what setuptools finds by itself, and of what was compiled in place."""


def test_every_file_of_the_package_is_in_the_wheel() -> None:
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    folders = [(ROOT / name.replace(".", "/"), pattern) for name, patterns in data.items() for pattern in patterns]
    named = {path for folder, pattern in folders for path in folder.glob(pattern)}
    files = {path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in MADE_HERE}
    assert len(files) > 1
    assert files - named == set()
    assert [(folder, pattern) for folder, pattern in folders if not any(folder.glob(pattern))] == []
