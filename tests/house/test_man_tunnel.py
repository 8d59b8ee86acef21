"""tunnel(1) has every command, option, variable and exit status of `tunnel`, and no other."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import tunneld
from tunneld.agent import events
from tunneld.agent.keys import KEYS, RELAY_KEYS
from tunneld.cli import access, common, keyring
from tunneld.cli.commands import VERBS
from tunneld.cli.tunnel import parser
from tunneld.control.commands import COMMANDS
from tunneld.errors import EXIT_STATUSES, RelayUnreachableError

PAGE = Path(tunneld.__file__).parents[1] / "man" / "tunnel.1"
TEXT = PAGE.read_text()
SubParsers = argparse._SubParsersAction
WITHOUT_A_COMMAND = {
    *("auth", "help", "quit", "join", "leave", "certificates", "credentials", "trycertificate", "renew"),
    *("visittunnel", "invitevisitor"),
}
"""Verbs of the control protocol without a command of `tunnel`: they concern one connection, or only agents, or are
commands of `tunneld certificate`, or a part of what a command does.
"""


def commands() -> dict[str, argparse.ArgumentParser]:
    (found,) = (action for action in parser()._actions if isinstance(action, SubParsers))
    return found.choices


def credential_commands() -> dict[str, argparse.ArgumentParser]:
    """The commands of `tunnel credential`."""
    (found,) = (action for action in commands()["credential"]._actions if isinstance(action, SubParsers))
    return found.choices


def options(made: argparse.ArgumentParser) -> Iterator[str]:
    for action in made._actions:
        yield from (name for name in action.option_strings if name.startswith("--"))


def every_option() -> set[str]:
    return {
        name for made in (parser(), *commands().values(), *credential_commands().values()) for name in options(made)
    }


def documented_options() -> set[str]:
    flags = re.findall(r"\bFl (?:h , )?-([a-z-]+)|\| -([a-z-]+)", TEXT)
    return {f"--{first or second}" for first, second in flags}


def section(title: str) -> str:
    return TEXT.split(f".Sh {title}\n")[1].split("\n.Sh ")[0]


def test_the_page_has_exactly_the_options_of_the_program() -> None:
    assert documented_options() == every_option()


def test_the_page_has_exactly_the_commands_of_the_program() -> None:
    entries = set(re.findall(r"^\.It Cm (\w+)", TEXT.split(".Ss JSON")[0], flags=re.MULTILINE))
    assert entries - {"unix"} == set(commands())


def test_the_page_has_exactly_the_credential_commands() -> None:
    entries = set(re.findall(r"^\.It Cm credential (\w+)", TEXT, flags=re.MULTILINE))
    lines = re.findall(r"^\.Ic (.+)", section("SYNOPSIS"), flags=re.MULTILINE)
    assert entries == {word for line in lines for word in line.split()} - {"|"} == set(credential_commands())


def test_the_synopsis_names_every_command() -> None:
    named = {
        word for line in re.findall(r"^\.Cm (.+)", section("SYNOPSIS"), flags=re.MULTILINE) for word in line.split()
    }
    assert named - {"|"} == set(commands())


def test_every_verb_of_the_control_protocol_has_a_command() -> None:
    assert {verb.wire.lower() for verb in VERBS} == set(COMMANDS) - WITHOUT_A_COMMAND


def test_the_page_has_exactly_the_variables_of_the_program() -> None:
    source = Path(access.__file__).read_text() + Path(access.__file__).read_text()
    read = (
        set(re.findall(r"TUNNEL_[A-Z][A-Z_]*", source))
        | {f"TUNNEL_{name}" for name in ("CA", "CERT", "KEY")}
        | {"TERM", "NO_COLOR", "XDG_CONFIG_HOME"}  # by styled.py; the last by places.py, for expose.toml
    )
    assert set(re.findall(r"^\.It Ev (\w+)", TEXT, flags=re.MULTILINE)) == read


def test_the_page_has_exactly_the_exit_statuses_of_the_program() -> None:
    gone = {common.INTERRUPTED, common.OutputError.exit_status, common.OutputGoneError.exit_status}
    ours = {0, RelayUnreachableError.exit_status, *EXIT_STATUSES.values(), *gone}
    assert {int(status) for status in re.findall(r"^\.It (\d+)$", TEXT, flags=re.MULTILINE)} == ours


def test_the_page_has_exactly_the_events_of_the_agent() -> None:
    told = set(re.findall(r"^ {4}(\w+) ", events.__doc__ or "", flags=re.MULTILINE))
    told = told or set(re.findall(r"^(\w+)  +\w", events.__doc__ or "", flags=re.MULTILINE))
    documented = TEXT.split(".Ss JSON")[1].split(".Sh ENVIRONMENT")[0]
    assert set(re.findall(r"^\.It Cm (\w+)", documented, flags=re.MULTILINE)) == told


def test_every_default_is_in_the_page() -> None:
    for made in commands().values():
        for action in made._actions:
            if action.default not in (None, False, argparse.SUPPRESS) and action.option_strings != ["--relay"]:
                name = action.option_strings[0].removeprefix("-")
                entry = TEXT.split(f".It Fl {name} ")[1].split("\n.It ")[0]
                said = entry.replace(".Cm ", "").replace(".Pa ", "")
                default = action.default if isinstance(action.default, str) else f"{action.default:g}"
                assert f"default is {default}" in " ".join(said.split()), action.option_strings
    assert access.DEFAULT_RELAY in TEXT


def test_the_page_has_exactly_the_keys_of_the_file() -> None:
    room = TEXT.split(".Ss Several local servers\n")[1].split("\n.Ss ")[0]
    relay, exposed = room.split("Each table\n")
    for text, table in ((relay, RELAY_KEYS), (exposed, KEYS)):
        named = [word for line in re.findall(r"^\.It Ic (.+)$", text, re.MULTILINE) for word in line.split(" , ")]
        assert sorted(named) == sorted(table)


def test_every_key_of_the_file_is_an_option() -> None:
    made = {action.dest for action in commands()["expose"]._actions}
    spelled = {"where": "relay"}
    assert {spelled.get(name, name) for name in (*KEYS, *RELAY_KEYS)} <= made


def test_the_roles_are_in_the_page() -> None:
    entry = TEXT.split(".It Fl -role ")[1].split("\n.It ")[0]
    assert set(re.findall(r"^\.Cm (\w+)", entry, flags=re.MULTILINE)) == set(keyring.ROLES)


def test_mandoc_lint_reports_nothing() -> None:
    mandoc = shutil.which("mandoc")
    if mandoc is None and not os.environ.get("TUNNELD_REQUIRE_PROGRAMS"):
        pytest.skip("mandoc is not installed")
    result = subprocess.run(
        [mandoc or "mandoc", "-T", "lint", "-W", "style", PAGE], capture_output=True, text=True, check=False, timeout=60
    )
    complaints = [line for line in result.stdout.splitlines() if "referenced manual not found" not in line]
    assert complaints == []
