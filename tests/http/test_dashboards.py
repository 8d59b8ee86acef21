"""The dashboard for Grafana and the alert rules for Prometheus name metrics and labels that a relay has."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trio
import trustme
from prometheus_client.parser import text_string_to_metric_families

from tests.http.support import running_http
from tunneld.tls.store import CertificateStore

CONFIG = Path(__file__).parents[2] / "config"
DASHBOARD = CONFIG / "grafana-dashboard.json"
ALERTS = CONFIG / "prometheus-alerts.yml"
OF_PROMETHEUS = {"job", "instance", "le"}
"""Labels that Prometheus adds, and that of buckets."""


def panels() -> Iterator[dict[str, Any]]:
    yield from (panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row")


def queries() -> list[str]:
    """All expressions of both files."""
    shown = [target["expr"] for panel in panels() for target in panel["targets"]]
    variables = json.loads(DASHBOARD.read_text())["templating"]["list"]
    shown += [one["query"]["query"] for one in variables if one["type"] == "query"]
    rules = re.findall(r"^ +expr: (?:>-\n((?: {10,}.*\n)+)|(.*)\n)", ALERTS.read_text(), re.MULTILINE)
    return [*shown, *(folded or line for folded, line in rules)]


async def samples(tmp_path: Path) -> dict[str, set[str]]:
    """The samples of a relay that has a tunnel and a certificate, each with its labels."""
    async with running_http() as relay:
        issued = trustme.CA().issue_cert("blog.example.org")
        store = relay.daemon.certificates = CertificateStore(tmp_path)
        store.put(issued.cert_chain_pems[0].bytes(), issued.private_key_pem.bytes())
        await relay.post_json("openTunnel", {"options": {"persist": "yes", "deny_from": "127.0.0.0/8"}})
        (tunnel,) = relay.daemon.service.tunnels()
        with suppress(OSError, trio.BrokenResourceError):  # refused, perhaps before `open_tcp_stream` has returned
            await (await trio.open_tcp_stream("127.0.0.1", tunnel.client_uri.port or 0)).aclose()
        while not tunnel.refusals:
            await trio.lowlevel.checkpoint()
        text = (await relay.request("GET", "/metrics")).text
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


async def test_every_metric_and_label_exists(tmp_path: Path) -> None:
    known, asked = await samples(tmp_path), set[str]()
    for query in queries():
        names = set(re.findall(r"\btunneld_[a-z_]+", query))
        asked |= names
        assert names <= set(known), query
        labels = set(re.findall(r"[{,(]\s*([a-z_]+)\s*(?:=~|!=|=)", query))
        labels |= {word for words in re.findall(r"(?:by|ignoring) \(([^)]*)\)", query) for word in words.split(", ")}
        assert labels <= OF_PROMETHEUS.union(*(known[name] for name in names)), query
    not_asked = {name for name in known.keys() - asked if not name.startswith("tunneld_mail_")}  # of few relays
    assert not_asked <= {
        "tunneld_ready", "tunneld_reservations", "tunneld_tunnels_opened_total",
        "tunneld_event_loop_delay_seconds_count", "tunneld_event_loop_delay_seconds_sum",
    }  # fmt: skip


@pytest.mark.parametrize("query", queries())
def test_brackets_are_balanced(query: str) -> None:
    text, stack = re.sub(r'"[^"]*"', "", query), []
    for character in text:
        if character in "([{":
            stack.append(character)
        elif character in ")]}":
            assert stack, query
            assert stack.pop() + character in {"()", "[]", "{}"}
    assert not stack


def test_panels_do_not_overlap_and_have_an_id_each() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
    ids = [panel["id"] for panel in json.loads(DASHBOARD.read_text())["panels"]]
    assert len(ids) == len(set(ids))


def test_every_alert_says_what_to_do() -> None:
    rules = ALERTS.read_text().split("- alert: ")[1:]
    assert len({rule.split("\n")[0] for rule in rules}) == len(rules) > 10
    for rule in rules:
        assert all(f"{key}: " in rule for key in ("expr", "severity", "summary", "description")), rule


def test_promtool_accepts_the_rules() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool")
    subprocess.run([promtool, "check", "rules", ALERTS], check=True, capture_output=True, timeout=60)
