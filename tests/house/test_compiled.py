"""Compiled files (setup.py) have no code that mypyc 2.4 compiles to something else than Python does."""

from __future__ import annotations

import ast
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def compiled_files() -> list[Path]:
    """The files that setup.py compiles."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr("setuptools.setup", lambda **_: None)
        found: list[str] = runpy.run_path("setup.py")["hot_files"]()
    return [ROOT / path for path in found]


def test_every_module_in_setup_exists() -> None:
    names = {path.relative_to(ROOT / "tunneld").as_posix() for path in compiled_files()}
    assert {"engine/pump.py", "engine/relay.py", "wire/webmux/mux.py", "agent/visitors.py"} <= names
    assert len(names) > 40


@pytest.mark.parametrize("path", compiled_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_code_that_is_compiled_differently(path: Path) -> None:
    """mypyc evaluates a call in a slice bound twice, drops the cause of an exception, and does not cache properties."""
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Subscript(slice=ast.Slice() as bounds):
                calls = [ast.unparse(part.func) for part in ast.walk(bounds) if isinstance(part, ast.Call)]
                assert set(calls) <= {"len", "min", "max"}, ast.unparse(node)
            case ast.Raise(cause=ast.expr() as cause):
                assert ast.unparse(cause) == "None", ast.unparse(node)
            case ast.AnnAssign(annotation=ast.Name(id="memoryview")) if node.value is None:
                pytest.fail(f"line {node.lineno}: mypyc cannot import a field with the type memoryview alone")
            case ast.Attribute(attr="cached_property"):
                pytest.fail(f"line {node.lineno}: cached_property")


@pytest.mark.parametrize(
    "path",
    [path for path in compiled_files() if {"engine", "mux", "webmux"} & set(path.relative_to(ROOT).parts)],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_constants_of_the_data_plane_are_final(path: Path) -> None:
    """mypyc looks up any other global by its name, at each use."""
    others = [
        node.targets[0].id
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id.isupper()
    ]
    assert set(others) <= {"MAX_CHANNELS"}, "except where tests set it"


def test_no_class_inherits_across_the_border() -> None:
    """An interpreted class cannot inherit from a compiled one, and a compiled one must not from an interpreted one."""
    compiled = set(compiled_files())
    classes = {
        node.name: (path, [base.id for base in node.bases if isinstance(base, ast.Name)])
        for path in (ROOT / "tunneld").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    }
    for name, (path, bases) in classes.items():
        for base in bases:
            if base in classes and not base.endswith("Error"):
                assert (path in compiled) == (classes[base][0] in compiled), f"{name} inherits from {base}"
