"""What --print-config prints loads back to the same, and is complete."""

from __future__ import annotations

import tomllib
from pathlib import Path

from hypothesis import HealthCheck, given
from hypothesis import settings as limits
from hypothesis import strategies as st
from pydantic_core import PydanticUndefined

from tests.config import strategies
from tunneld.config import Settings, dump
from tunneld.config.file import parse
from tunneld.config.keys import keys


@limits(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.data())
def test_every_configuration_loads_back_equal(certificates: Path, data: st.DataObject) -> None:
    settings = data.draw(strategies.settings(certificates))
    assert parse(dump(settings).encode(), Path("/nowhere")) == settings


def test_every_key_that_is_set_is_there() -> None:
    written = tomllib.loads(dump(Settings()))
    found = {f"{table}.{key}" for table, values in written.items() for key in values}
    assert found == {
        key.path for key in keys() if key.field.default not in (None, PydanticUndefined) and not key.repeated
    }
