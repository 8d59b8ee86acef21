"""Imports point down the layers, and pure packages do no input or output."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import tunneld

ROOT = Path(tunneld.__file__).parent

LAYERS = [  # from the bottom up: a package may import from its own layer and from the layers below
    {"errors", "line_log", "log", "systemd"},
    {"net"},
    {"tls"},
    {"wire"},
    {"engine"},
    {"mux"},
    {"egtp"},
    {"policy"},
    {"config"},
    {"acme"},
    {"auth"},
    {"sites"},
    {"tunnel"},
    {"directory"},
    {"backends"},
    {"control"},
    {"http"},
    {"client"},
    {"inspector"},
    {"agent", ""},  # "": the package itself, which only names the public interface
    {"daemon"},
    {"cli", "__main__"},
]
PURE = {"wire", "policy"}
IMPURE = {"trio", "socket", "ssl", "time", "random", "secrets", "logging", "structlog", "select", "datetime"}


def layer_of(package: str) -> int:
    return next(number for number, packages in enumerate(LAYERS) if package in packages)


def package_of(module: str) -> str:
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


def package_of_file(path: Path) -> str:
    first = path.relative_to(ROOT).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    here = package_of_file(path)
    for name in imports(path):
        if name.split(".")[0] == "tunneld" and name != "tunneld.__version__":
            there = package_of(name)
            assert layer_of(there) <= layer_of(here), f"{path.relative_to(ROOT)} imports {name} from a layer above it"


def test_clients_and_agents_do_not_import_the_server() -> None:
    for path in files():
        if package_of_file(path) in {"agent", "client"}:
            assert not {
                name for name in imports(path) if package_of(name) in {"control", "directory", "tunnel", "daemon"}
            }, path


@pytest.mark.parametrize(
    "path", [path for path in files() if package_of_file(path) in PURE], ids=lambda path: path.name
)
def test_pure_packages_do_no_input_or_output(path: Path) -> None:
    assert not {name.split(".")[0] for name in imports(path)} & IMPURE


def test_the_check_detects_an_upward_import(tmp_path: Path) -> None:
    upward = tmp_path / "errors.py"
    upward.write_text("from tunneld.cli import tunneld\nimport tunneld.directory\n")
    assert {layer_of(package_of(name)) for name in imports(upward)} == {13, 21}


ENGINE_CONTRACT = {
    *("acceptor", "budget", "end", "end_stream", "engine", "events", "failures", "handover", "limits", "new_engine"),
    *("pipes", "plain_transport", "pump", "scheduler", "stream_end", "tapped", "throttle", "timers", "tls_end"),
    "tls_over_end",
}
"""Modules of the engine that other packages may import: not its relays, flows and tables."""


def test_other_packages_use_the_contract_of_the_engine_only() -> None:
    for path in files():
        if path.parent.name == "engine":
            continue
        for module in imports(path):
            if module.startswith("tunneld.engine."):
                assert module.split(".")[2] in ENGINE_CONTRACT, f"{path} imports {module}"
        if {"mux", "backends", "agent"} & set(path.parts):
            for node in ast.walk(ast.parse(path.read_text())):
                match node:
                    case ast.Attribute(value=ast.Attribute(attr="pump" | "_pump" | "engine"), attr=str(name)):
                        assert not name.startswith("_"), f"{path}:{node.lineno} reaches into the engine"
