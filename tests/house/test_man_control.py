"""tunneld-control(7) has exactly the verbs, options, events, codes, faults and metrics of the program."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

import tunneld
from tests.http.support import running_http
from tunneld.control.commands import COMMANDS
from tunneld.errors import EXIT_STATUSES
from tunneld.http.problems import FAULTS, STATUSES
from tunneld.policy.options import OPTIONS

SOURCE = Path(tunneld.__file__).parent
MANUAL = (Path(__file__).parents[2] / "man" / "tunneld-control.7").read_text()


def section(title: str) -> str:
    """One section of the page."""
    return MANUAL.partition(f".Sh {title}\n")[2].partition("\n.Sh ")[0]


PAGE = section("OVER HTTP")


def items(title: str) -> list[str]:
    """The words listed in a section."""
    return re.findall(r"^\.It Cm (\S+)", section(title), flags=re.MULTILINE)


def published() -> set[str]:
    """The names of all events that the source publishes."""
    calls = (node for path in SOURCE.rglob("*.py") for node in ast.walk(ast.parse(path.read_text())))
    names = set()
    for node in calls:
        match node:
            case ast.Call(func=ast.Attribute(attr="publish"), args=[ast.Constant(value=str(name)), *_]):
                names.add(name)
    return names


def keys_of(verb: str) -> list[str]:
    """The keys listed in the entry of a verb."""
    entry = re.split(r"^\.It Cm ", section("VERBS").partition(f"\n.It Cm {verb}\n")[2], flags=re.MULTILINE)[0]
    return re.findall(r"^\.It Va (\w+)$", entry.partition("\n.El\n")[0], flags=re.MULTILINE)


def made(path: str, function: str) -> set[str]:
    """The keys of the dictionary that a function of the source returns."""
    tree = ast.parse((SOURCE / path).read_text())
    found = next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == function)
    returned = next(node.value for node in ast.walk(found) if isinstance(node, ast.Return))
    assert isinstance(returned, ast.Dict)
    return {key.value for key in returned.keys if isinstance(key, ast.Constant) and isinstance(key.value, str)}


def test_the_page_has_exactly_the_verbs_and_options() -> None:
    assert sorted(items("VERBS")) == sorted(command.verb for command in COMMANDS.values())
    assert sorted(items("TUNNEL OPTIONS")) == sorted(OPTIONS)


@pytest.mark.parametrize(
    ("verb", "path", "function"),
    [
        ("list", "control/describe.py", "describe_tunnel"),
        ("reservations Op Ar address | name", "control/describe.py", "describe_reservation"),
        ("status", "daemon/daemon.py", "status"),
    ],
)
def test_the_page_has_the_keys_of_items_in_alphabetical_order(verb: str, path: str, function: str) -> None:
    assert keys_of(verb) == sorted(made(path, function))


def test_the_page_has_exactly_the_events() -> None:
    assert len(published()) > 5
    assert set(items("EVENTS")) == published() | {"live", "lost", "watching"}


def test_the_page_has_exactly_the_error_codes() -> None:
    assert set(items("ERROR CODES")) == set(EXIT_STATUSES)


@pytest.mark.parametrize("title", ["VERBS", "TUNNEL OPTIONS", "EVENTS", "ERROR CODES"])
def test_words_are_listed_once_in_alphabetical_order(title: str) -> None:
    assert items(title) == sorted(set(items(title)), key=str.lower)


def test_every_error_code_has_an_http_status_and_a_fault() -> None:
    rows = re.findall(r"^\.It ([a-z-]+) Ta (\d+) Ta (\d+)$", PAGE, flags=re.MULTILINE)
    assert {code: (int(status), int(fault)) for code, status, fault in rows} == {
        code: (STATUSES[code].value, FAULTS[code]) for code in STATUSES
    }


async def test_every_metric_is_told() -> None:
    async with running_http() as relay:
        text = (await relay.request("GET", "/metrics")).body.decode()
    families = text_string_to_metric_families(text)
    served = {f"{family.name}_total" if family.type == "counter" else family.name for family in families}
    assert {name.removesuffix("_info") for name in re.findall(r"tunneld_[a-z_]+", PAGE)} == {
        name.removesuffix("_info") for name in served
    }
