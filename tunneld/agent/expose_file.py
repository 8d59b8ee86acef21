"""expose.toml: a relay and several exposures, as values that cannot be wrong. tunnel(1) describes every key."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from tunneld.agent.config import ExposureConfig, plan_of
from tunneld.agent.health import HEALTHY_AFTER, INTERVAL, MAX_CHECKS, PATH, TIMEOUT, UNHEALTHY_AFTER
from tunneld.agent.shutdown import DRAIN_WITHIN
from tunneld.config.certificates import locate
from tunneld.config.file import load_as, toml
from tunneld.config.values import (
    MILLISECOND,
    YEAR,
    File,
    Loading,
    NetworkList,
    Seconds,
    SecondsOrNone,
    Table,
    VisitorRate,
    literal,
)
from tunneld.errors import UsageError
from tunneld.net.endpoint import MAX_PORT, Target, parse_relay
from tunneld.policy.options import OPTIONS
from tunneld.tls.pins import parse_pins

Looks = Annotated[int, Field(ge=1, le=MAX_CHECKS)]
Pool = Annotated[int, Field(ge=1, le=100_000)]
Most = Annotated[int | None, Field(ge=1, le=1_000_000)]
SomeSeconds = Annotated[float | None, Field(ge=MILLISECOND, le=YEAR, allow_inf_nan=False)]
FreePort = Annotated[int | None, Field(ge=1, le=MAX_PORT)]
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # what openTunnel takes as a name


def _as(read: Callable[[str], object]) -> AfterValidator:
    """A string that `read` takes; it stays as it was written."""

    def check(value: str) -> str:
        try:
            read(value)
        except UsageError as error:
            raise ValueError(str(error)) from None
        except ValueError as error:
            raise ValueError(f"{literal(value)} is {error}") from None
        return value

    return AfterValidator(check)


def _port_as_text(value: object) -> object:
    """A port may be written as the number that it is."""
    return str(value) if type(value) is int else value


def path_of_request(text: str) -> str:
    """Check what a request line can carry as a path. Raises `ValueError`."""
    if not (text.startswith("/") and text.isascii() and text.isprintable() and " " not in text):
        raise ValueError(f"{literal(text)} is not a path that a request line can carry")
    return text


class RelayTable(Table):
    """`[relay]`: how to reach it, and as whom. What is left out comes from the environment, as for the options."""

    where: Annotated[str, _as(parse_relay)] | None = None
    ca: File | None = None
    pin: Annotated[str, _as(parse_pins)] | None = None
    insecure: bool = False
    cert: File | None = None
    key: File | None = None
    credential: str | None = None
    secret_file: File | None = None
    timeout: Seconds = 10.0

    _locate = field_validator("ca", "cert", "key", "secret_file")(locate)


class ExposureTable(Table):
    """`[expose.NAME]`: one local server."""

    target: Annotated[str, _as(Target.parse), BeforeValidator(_port_as_text)]
    scheme: Literal["tcp", "http", "https"] = "tcp"
    name: Annotated[str, _as(OPTIONS["name"].read)] | None = None
    share: bool = False
    client_port: FreePort = None
    backend: Literal["webmux", "tcp"] | None = None
    secure: Literal["yes", "key", "no"] | None = None
    ttl: SomeSeconds = None
    idle_timeout: SomeSeconds = None
    pairing_timeout: SomeSeconds = None
    linger: Seconds = 60.0
    drain_timeout: SecondsOrNone = DRAIN_WITHIN
    pool: Pool = 8
    max_pool: Pool = 200
    proxy_protocol: bool = False
    allow_from: NetworkList = ()
    deny_from: NetworkList = ()
    max_visitors: Most = None
    max_per_source: Most = None
    visitor_rate: VisitorRate | None = None
    bandwidth: Annotated[str, _as(OPTIONS["bandwidth"].read)] | None = None
    quota: Annotated[str, _as(OPTIONS["quota"].read)] | None = None
    health: Literal["tcp", "http"] | None = None
    health_path: Annotated[str, AfterValidator(path_of_request)] = PATH
    health_interval: Seconds = INTERVAL
    health_timeout: Seconds = TIMEOUT
    unhealthy_after: Looks = UNHEALTHY_AFTER
    healthy_after: Looks = HEALTHY_AFTER
    unhealthy: Literal["answer", "withdraw", "tell"] = "answer"

    @model_validator(mode="after")
    def _is_a_plan(self) -> ExposureTable:
        try:
            self.plan("x")
        except UsageError as error:
            raise ValueError(str(error)) from None
        return self

    def plan(self, name: str) -> ExposureConfig:
        """What is wanted; `name` is that of the table, and of the tunnel unless it has its own."""
        words: dict[str, Any] = self.model_dump()
        for networks in ("allow_from", "deny_from"):
            words[networks] = ",".join(words[networks]) or None
        return plan_of({**words, "name": self.name or name}, str)


class ExposeFile(Table):
    """A whole expose.toml."""

    relay: RelayTable = RelayTable()
    expose: dict[str, ExposureTable] = Field(default_factory=dict)

    @field_validator("expose")
    @classmethod
    def _has_names(cls, value: dict[str, ExposureTable], info: ValidationInfo) -> dict[str, ExposureTable]:
        for name in value:
            if not _NAME.fullmatch(name):
                raise ValueError(
                    f"{literal(name)} is not a name of at most 64 letters, digits, dots, dashes and underscores"
                )
        if not value and info.context is not None:
            raise ValueError("there is nothing to expose: add a table [expose.NAME] with a target")
        return value

    @property
    def plans(self) -> Mapping[str, ExposureConfig]:
        """What is wanted, by name."""
        return {name: exposed.plan(name) for name, exposed in self.expose.items()}


def load_plans(path: Path) -> ExposeFile:
    """Read expose.toml. Relative paths in it start from its folder. Raises `ConfigError`, a sentence a mistake."""
    return load_as(ExposeFile, path, _parse)


def _parse(content: bytes, folder: Path) -> ExposeFile:
    return ExposeFile.model_validate({"expose": {}, **toml(content)}, context=Loading(folder))
