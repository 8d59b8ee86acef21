"""What the relay reports: the tables [log], [events], [metrics] and [records]."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from tunneld.config.paths import absolute_path
from tunneld.config.values import DAY, File, Seconds, Table


class LogSettings(Table):
    """`[log]`: one event per line on standard error."""

    format: Literal["auto", "human", "json"] = "auto"
    level: Literal["debug", "info", "warning", "error"] = "info"


class EventsSettings(Table):
    """`[events]`: past events, for `watch since=...`."""

    max_kept: Annotated[int, Field(ge=0, le=1_000_000)] = 10_000  # 5 MiB; a busy relay has that many in a few days
    max_age: Seconds = 7 * DAY  # a weekend, and the days on which a problem is looked into
    connections: bool = False  # addresses of visitors are personal data, and there may be thousands in a second


class MetricsSettings(Table):
    """`[metrics]`: what /metrics has for single tunnels."""

    max_tunnels: Annotated[int, Field(ge=0, le=1_000_000)] = 100  # ten samples each; monitoring keeps them for months


class RecordsSettings(Table):
    """`[records]`: a line for each visitor that has left."""

    file: File | None = None  # None: nothing is recorded; addresses of visitors are personal data
    addresses: Literal["full", "network", "none"] = "full"  # whoever sets `file` wants to know where visitors come from

    _absolute = field_validator("file")(absolute_path)
