"""tunnel.toml(5) has exactly the keys of the configuration, and tunneld(8) exactly the options of the daemon."""

from __future__ import annotations

import argparse
import ast
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
from pydantic_core import PydanticUndefined

import tunneld
from tunneld import daemon
from tunneld.cli import common
from tunneld.cli.tunneld import parser
from tunneld.config.keys import Key, keys
from tunneld.config.problems import bounds
from tunneld.config.wording import literal
from tunneld.daemon.signals import SIGNALS
from tunneld.errors import AwaitedConfigError, ConfigError, ListenError, LocalProtocolError, UsageError

MAN = Path(__file__).parents[2] / "man"
SOURCE = Path(tunneld.__file__).parent
PAGES = ["tunneld.8", "tunnel.toml.5", "tunneld-control.7"]

ENTRY_END = re.compile(
    r"^(?:The default is\n\.Ql (?P<default>.+) \.|Not set by default\.|This key is (?P<required>required)\.)\n"
    r"Applied on (?:(?P<live>reload)|restart)\.\s*\Z",
    re.MULTILINE,
)


TYPES = {  # types of strings for which the schema has only a pattern
    "credential.name": "name",
    "credential.verifier": "verifier",
    "credential.secret_env": "variable",
    "credential.certificate": "fingerprint",
    "credential.backends": "array of backends",
    "credential.ports": "array of ranges",
    "credential.bind": "array of networks",
    "credential.networks": "array of networks",
    "credential.names": "array of patterns",
    "credential.server_from": "array of networks",
    "credential.nodes": "array of node ids",
    "credential.visit": "array of patterns",
    "control.abandoned_handshakes": "rate",
    "control.authorize": "URL, or path of a program",
    "control.authorize_cache": "seconds, or 0",
    "control.authorize_events": "array of login, open or visitor",
    "control.trusted_networks": "array of networks",
    "tunnels.allow_from": "array of networks",
    "tunnels.deny_from": "array of networks",
    "tunnels.trusted_proxies": "array of networks",
    "tunnels.visitor_rate": "rate",
    "egtp.mail_rate": "rate",
    "control.max_startups": "startups",
    "webmux.host": "host",
    "egtp.host": "host",
    "names.domain": "domain",
    "names.http": "address",
    "names.https": "address",
    "names.trusted_proxies": "array of networks",
    "names.proxy_protocol": "array of networks",
    "names.certificate_wait": "seconds, or 0",
    "names.resolver": "address",
    "names.response_timeout": "seconds, or 0",
    "names.forward_auth": "array of URLs",
    "names.forward_auth_cache": "seconds, or 0",
    "events.max_kept": "count, or 0",
    "metrics.max_tunnels": "count, or 0",
    "daemon.user": "user",
    "daemon.group": "group",
    "ssh.host": "host",
    "credential.authorized_keys": "array of lines",
    "tunnels.port_quarantine": "seconds, or 0",
    "tunnels.unacknowledged_timeout": "seconds, or 0",
    "tunnels.reservation": "seconds, or 0",
    "daemon.spin": "seconds, between 0 and 0.01",
    "daemon.state": "folder",
    "control.credential_share": "number, above 0 and up to 1",
    "control.reserved_connections": "count, or 0",
    "http.reserved_connections": "count, or 0",
    "ssh.reserved_connections": "count, or 0",
    "acme.contact": "address",
    "acme.directory": "URL",
    "acme.profile": "string",
    "acme.dns_hook": "array of strings",
    "acme.max_orders": "rate",
    "acme.max_orders_per_owner": "rate",
    "acme.renew_left": "number, between 0.05 and 0.9",
    "acme.renew_left_short": "number, between 0.05 and 0.9",
    "acme.rfc2136.key_name": "string",
    "acme.rfc2136.server": "address",
}


@dataclass(frozen=True)
class Entry:
    """The entry of a key in tunnel.toml(5)."""

    takes: str
    default: str | None
    live: bool
    required: bool


def plain(mdoc: str) -> str:
    """The text of an mdoc argument."""
    return mdoc.replace(r"\(dq", '"').replace(" ,", ",")


def entries() -> dict[str, Entry]:
    """The keys of tunnel.toml(5) by their paths."""
    found = {}
    tables = re.split(r"^\.Ss Bq (?:Bq )?(.+)\n", (MAN / "tunnel.toml.5").read_text(), flags=re.MULTILINE)
    for table, section in zip(tables[1::2], tables[2::2], strict=True):
        body = section.split("\n.El\n")[0]
        items = re.split(r"^\.It Ic (\S+) Pq (.+)\n", body, flags=re.MULTILINE)
        for name, takes, text in zip(items[1::3], items[2::3], items[3::3], strict=True):
            end = ENTRY_END.search(text)
            assert end is not None, f"{table}.{name} does not end with its default and what a reload does"
            default = None if end["default"] is None else plain(end["default"])
            found[f"{table}.{name}"] = Entry(
                plain(takes), default, live=end["live"] is not None, required=end["required"] is not None
            )
    return found


def takes(key: Key) -> str:
    """The type of a key as the page should describe it."""
    if word := TYPES.get(key.path):
        return word
    kind = key.field.annotation
    if kind in (int, int | None):
        lowest, highest = bounds(key.field)
        named = {("0", "65535"): "port", ("1", "1000000"): "count"}
        return named.get((lowest, highest), f"bytes, between {lowest} and {highest.replace('1e+', '10^')}")
    if get_origin(kind) is Literal:
        *others, last = get_args(kind)
        return f"{', '.join(others)} or {last}"
    if kind is str:
        return "range" if key.path == "tunnels.ports" else "host"
    words = {"bool": "boolean", "float": "seconds", "Path": "file", "tuple": "array of hosts"}
    return next(word for name, word in words.items() if name in str(kind))


# The keys


def test_the_page_has_exactly_the_keys_of_the_configuration() -> None:
    assert sorted(entries()) == sorted(key.path for key in keys())


@pytest.mark.parametrize("key", list(keys()), ids=lambda key: key.path)
def test_an_entry_agrees_with_the_schema(key: Key) -> None:
    default = key.field.default
    expected = None if default in (None, PydanticUndefined) else literal(default)
    assert entries()[key.path] == Entry(takes(key), expected, key.live, key.field.is_required())


RESTART_KEYS = [key.path for key in keys() if not key.live]


@pytest.mark.parametrize(
    ("document", "before", "after"),
    [
        (MAN / "tunneld.8", "each that requires a restart:", "Changed listening"),
        (MAN.parent / "CHANGELOG.md", "including certificates and ports; only", "need a restart"),
    ],
    ids=["tunneld.8", "CHANGELOG.md"],
)
def test_documents_name_the_keys_that_need_a_restart(document: Path, before: str, after: str) -> None:
    named = document.read_text().partition(before)[2].partition(after)[0]
    assert re.findall(r"[a-z]+\.[a-z_]+", named) == sorted(RESTART_KEYS)


def test_the_annotated_configuration_marks_the_keys_that_need_a_restart() -> None:
    lines = (MAN.parent / "config/tunnel.toml").read_text().splitlines()
    table, marked = "", []
    for line in lines:
        table = found[1] if (found := re.match(r"#?\[+([a-z.]+)\]", line)) else table
        if "# [restart]" in line:
            marked.append(f"{table}.{line.lstrip('#').partition(' ')[0]}")
    assert sorted(marked) == sorted(RESTART_KEYS)


def test_what_the_daemon_reads_once_needs_a_restart() -> None:
    """The daemon passes functions to its parts, which read the settings at each use; what it reads itself is fixed."""
    source = (SOURCE / "daemon/daemon.py").read_text()
    made = next(node for node in ast.walk(ast.parse(source)) if getattr(node, "name", "") == "__init__")
    delayed = {inner for node in ast.walk(made) if isinstance(node, ast.Lambda) for inner in ast.walk(node)}
    read = {ast.unparse(node) for node in ast.walk(made) if isinstance(node, ast.Attribute) and node not in delayed}
    once = {text.removeprefix("settings.") for text in read if re.fullmatch(r"settings\.[a-z]+\.[a-z_]+", text)}
    assert once == {"tunnels.accept_backoff", "daemon.spin", "daemon.state"}
    used_before_anything_else = {"daemon.user", "daemon.group", "egtp.identity", "ssh.host_key"}
    assert once | used_before_anything_else == set(RESTART_KEYS)


def test_tables_and_the_keys_in_each_are_in_alphabetical_order() -> None:
    paths = list(entries())
    assert paths == sorted(paths, key=lambda path: path.rpartition(".")[::2])


def test_times_with_special_bounds_agree_with_the_schema() -> None:
    fields = {key.path: key.field for key in keys()}
    assert bounds(fields["daemon.spin"]) == ("0", "0.01")
    assert bounds(fields["tunnels.reservation"])[0] == "0"


@pytest.mark.parametrize(
    ("word", "path"), [("seconds", "tunnels.linger"), ("count", "tunnels.max_parked"), ("port", "control.port")]
)
def test_the_types_of_numbers_have_the_bounds_of_the_schema(word: str, path: str) -> None:
    lowest, highest = next(bounds(key.field) for key in keys() if key.path == path)
    meaning = (MAN / "tunnel.toml.5").read_text().partition(f".It {word}\n")[2].partition(".It ")[0]
    assert f"between {lowest} and {highest}" in meaning


# The command


def section(name: str) -> str:
    """One section of tunneld(8)."""
    return (MAN / "tunneld.8").read_text().partition(f".Sh {name}\n")[2].partition("\n.Sh ")[0]


def flags(text: str) -> set[str]:
    """The options named in mdoc: `.It Fl h , -help`, `.Op Fl -check | Fl -print-config`."""
    lines = [line for line in text.splitlines() if re.match(r"\.(It|Op|Fl) ?.*\bFl\b|\.Fl", line)]
    return {f"-{name}" for line in lines for name in re.findall(r"(?:Fl|,) (-?[a-z][a-z-]*)", line)}


def commands(action: argparse.Action) -> list[argparse.ArgumentParser]:
    """The parsers of subcommands, if the action has any, and those of their subcommands."""
    found = list(action.choices.values()) if isinstance(action, argparse._SubParsersAction) else []
    return [*found, *(deeper for one in found for inner in one._actions for deeper in commands(inner))]


def test_the_page_has_exactly_the_options_of_the_daemon() -> None:
    parsers = [parser(), *(inner for action in parser()._actions for inner in commands(action))]
    options = {option for made in parsers for action in made._actions for option in action.option_strings}
    described = "\n".join(line for line in section("DESCRIPTION").splitlines() if line.startswith(".It Fl"))
    assert flags(described) == options
    assert flags(section("SYNOPSIS")) == options - {"-h"}
    assert flags((MAN / "tunneld.8").read_text()) == options


def test_choices_and_signals_agree_with_the_program() -> None:
    described = section("DESCRIPTION")
    for action in parser()._actions:
        for choice in action.choices or ():
            assert re.search(rf"^\.Cm .*\b{choice}\b", described, re.MULTILINE), choice
    named = set(re.findall(r"SIG[A-Z0-9]+", "".join(re.findall(r"^\.It Dv .*$", section("SIGNALS"), re.MULTILINE))))
    assert named == {number.name for number in SIGNALS}


def test_the_exit_statuses_are_those_of_the_program() -> None:
    told = {int(status) for status in re.findall(r"^\.It (\d+)$", section("EXIT STATUS"), re.MULTILINE)}
    kinds = (UsageError, LocalProtocolError, ListenError, ConfigError, AwaitedConfigError)
    ends = (common.OutputError, common.OutputGoneError)
    assert told == {os.EX_OK, daemon.CUT, common.INTERRUPTED} | {kind.exit_status for kind in (*kinds, *ends)}


def test_the_environment_is_what_the_program_reads() -> None:
    files = [SOURCE / "log.py", SOURCE / "systemd.py", *SOURCE.glob("config/*.py"), *SOURCE.glob("daemon/**/*.py")]
    read = {name for file in files for name in re.findall(r'environ\.get\("([A-Z_]+)"', file.read_text())}
    items = "".join(re.findall(r"^\.It Ev .*$", section("ENVIRONMENT"), re.MULTILINE))
    assert set(re.findall(r"[A-Z_]{2,}", items)) == read | {"HOME"}  # which pathlib reads


# All pages


def lists(page: str) -> list[list[str]]:
    """The tags of every list of options, words, keys, signals or variables; consecutive tags count as one."""
    found: list[list[str]] = []
    open_lists: list[list[str]] = []
    above = ""
    for line in (MAN / page).read_text().splitlines():
        if line.startswith(".Bl"):
            open_lists.append([])
        elif line.startswith(".El"):
            found.append(open_lists.pop())
        elif line.startswith(".It") and not above.startswith(".It"):
            tag = re.match(r"\.It (?:Fl|Cm|Ic|Ev|Va|Dv) -?(\S+(?: [a-z]\S*)*)", line)
            open_lists[-1].append(tag[1].lower() if tag else "")
        above = line
    return [tags for tags in found if all(tags)]


@pytest.mark.parametrize("page", [*PAGES, "tunnel.1"])
def test_lists_are_in_alphabetical_order(page: str) -> None:
    for tags in lists(page):
        assert tags == sorted(tags)


@pytest.mark.parametrize("page", PAGES)
def test_mandoc_lint_reports_nothing(page: str) -> None:
    mandoc = shutil.which("mandoc")
    if mandoc is None:
        pytest.skip("no mandoc")
    found = subprocess.run(
        [mandoc, "-T", "lint", "-W", "style", MAN / page], capture_output=True, text=True, timeout=60, check=False
    )
    not_installed = ("referenced manual not found", "outdated mandoc.db")
    assert [line for line in found.stdout.splitlines() if not any(note in line for note in not_installed)] == []
