"""tunneld-control(7) tells of every fault and every metric of the HTTP face, and of none that is not there."""

from __future__ import annotations

import re
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from tests.control.http_face import open_face
from tunneld.control.http.problems import FAULTS, STATUSES

PAGE = (Path(__file__).parents[2] / "man" / "tunneld-control.7").read_text().partition(".Sh OVER HTTP")[2]


def test_every_wire_code_has_its_status_and_its_fault() -> None:
    rows = re.findall(r"^\.It ([a-z-]+) Ta (\d+) Ta (\d+)$", PAGE, flags=re.MULTILINE)
    assert {code: (int(status), int(fault)) for code, status, fault in rows} == {
        code: (STATUSES[code].value, FAULTS[code]) for code in STATUSES
    }


async def test_every_metric_is_told() -> None:
    async with open_face() as face:
        text = (await face.ask("GET", "/metrics")).body.decode()
    families = text_string_to_metric_families(text)
    served = {f"{family.name}_total" if family.type == "counter" else family.name for family in families}
    assert {name.removesuffix("_info") for name in re.findall(r"tunneld_[a-z_]+", PAGE)} == {
        name.removesuffix("_info") for name in served
    }
