"""What a command imports before it does anything: that is most of the time in which it starts."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import json, sys
before = set(sys.modules)
from tunneld.cli.tunnel import main
try:
    main(sys.argv[1:])
except SystemExit:
    pass
print("\\n" + json.dumps(sorted(set(sys.modules) - before)))
"""

TRIO = {"trio", "attr", "attrs", "outcome", "sniffio", "sortedcontainers", "idna", "exceptiongroup"}
"""Trio and what it needs."""
INSPECTOR = {"h11"}
"""What `--inspect` needs beside."""
SERVER = {"acme", "auth", "backends", "control", "daemon", "directory", "http", "sites", "tunnel"}
"""Packages of which an agent needs nothing."""
NO_SCHEMA = {"config", "config.places", "config.toml_file", "config.trust", "config.wording"}
"""Modules of the configuration that do without pydantic."""
UNREACHABLE = "127.0.0.1:1"
"""No relay: the attempt to connect ends the command."""


def test_the_agent_as_a_single_file_has_what_an_agent_imports() -> None:
    file = runpy.run_path(str(Path(__file__).parents[2] / "packaging" / "agent.py"))
    packages = {"attr", "exceptiongroup", *file["PURE"]}  # attrs has the module attr; the group is of Python 3.10
    assert packages == TRIO | INSPECTOR | {"segno"}
    assert set(file["RELAY_ONLY"]) == SERVER


def test_a_command_that_needs_more_says_so() -> None:
    program = PROGRAM.replace("import json, sys", "import json, sys; sys.modules['pydantic'] = None")
    done = subprocess.run(
        [sys.executable, "-P", "-c", program, "credential", "list"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert "this needs the Python module pydantic, which is not installed here" in done.stderr
    assert "Traceback" not in done.stderr


def imported(*arguments: str) -> tuple[set[str], set[str]]:
    """The modules of ours and the other packages, outside the standard library, that a command imports."""
    program = [sys.executable, "-P", "-c", PROGRAM, *arguments]
    done = subprocess.run(program, capture_output=True, text=True, check=True, timeout=60)
    modules = set(json.loads(done.stdout.splitlines()[-1]))
    ours = {name.removeprefix("tunneld.") for name in modules if name.startswith("tunneld.")}
    return ours, {name.split(".")[0] for name in modules} - sys.stdlib_module_names - {"tunneld"}


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["list", "--help"]])
def test_help_and_version_import_no_package(arguments: list[str]) -> None:
    ours, packages = imported(*arguments)
    assert packages == set()
    assert {name.split(".")[0] for name in ours} <= {"cli", "errors", "log", "net", "policy", "wire"}


def test_version_imports_no_options() -> None:
    assert imported("--version")[0] == {"cli", "cli.commands", "cli.common", "cli.tunnel", "errors", "log"}


def test_a_request_imports_trio_and_the_client() -> None:
    ours, packages = imported("list", "--relay", UNREACHABLE)
    assert packages <= TRIO
    assert {name.split(".")[0] for name in ours} <= {
        *("agent", "cli", "client", "errors", "log", "net", "policy", "tls", "wire"),
    }
    assert "agent.expose" not in ours


@pytest.mark.parametrize("arguments", [["expose", "1"], ["expose", "1", "--health", "http"], ["visit", "x"]])
def test_expose_and_visit_import_trio_and_nothing_of_the_relay(arguments: list[str]) -> None:
    ours, packages = imported(*arguments, "--relay", UNREACHABLE)
    assert packages <= TRIO
    assert not {name.split(".")[0] for name in ours} & SERVER
    assert {name for name in ours if name.startswith("config")} <= NO_SCHEMA


def test_up_does_without_pydantic(tmp_path: Path) -> None:
    file = tmp_path / "expose.toml"
    file.write_text(f'[relay]\nwhere = "{UNREACHABLE}"\n[expose.a]\ntarget = 80\n')
    ours, packages = imported("up", "--check", "--file", str(file))
    assert packages <= TRIO
    assert not {name.split(".")[0] for name in ours} & SERVER
    assert {name for name in ours if name.startswith("config")} <= NO_SCHEMA
