"""Imports point one way, down the floors of the house; no import has side effects worth a task."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import tunneld

ROOT = Path(tunneld.__file__).parent

FLOORS = [  # from the street down to the cellar; a room may import from its own floor and from those below
    {"cli", "__main__"},
    {"agent", "daemon", ""},  # "": the package itself, which only hands out names
    {"control", "lobby", "carriers", "ssh", "handover", "client"},
    {"service"},
    {"tunnel"},
    {"backends"},
    {"session", "net", "trust", "tls", "pin", "config", "events", "log", "notify", "doors", "store"},
    {"wire", "endpoint", "rules"},
    {"relay", "errors", "build"},
]
PURE = {"wire", "endpoint", "rules"}
IMPURE = {"trio", "socket", "ssl", "time", "random", "secrets", "logging", "structlog", "select", "datetime"}


def floor_of(room: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Import(names=names):
                found |= {alias.name for alias in names}
            case ast.ImportFrom(module=str(module), names=names):
                inside = ROOT.parent.joinpath(*module.split("."))
                found |= {f"{module}.{alias.name}" if inside.is_dir() else module for alias in names}
    return found


def files() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def module_room(path: Path) -> str:
    first = path.relative_to(ROOT).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    here = module_room(path)
    for name in imports(path):
        if name.split(".")[0] == "tunneld" and name != "tunneld.__version__":
            there = room_of(name)
            assert floor_of(here) <= floor_of(there), f"{path.relative_to(ROOT)} imports {name} from a floor above it"


def test_the_two_ends_of_the_control_protocol_know_only_the_wire() -> None:
    for path in files():
        if module_room(path) in {"agent", "client"}:
            assert not {
                name for name in imports(path) if room_of(name) in {"control", "service", "tunnel", "daemon"}
            }, path


@pytest.mark.parametrize("path", [path for path in files() if module_room(path) in PURE], ids=lambda path: path.name)
def test_pure_rooms_do_no_input_or_output(path: Path) -> None:
    assert not {name.split(".")[0] for name in imports(path)} & IMPURE


def test_the_check_sees_an_upward_import(tmp_path: Path) -> None:
    upward = tmp_path / "errors.py"
    upward.write_text("from tunneld.cli import tunneld\nimport tunneld.service\n")
    assert {floor_of(room_of(name)) for name in imports(upward)} == {0, 3}
