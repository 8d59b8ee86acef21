"""The file expose.toml: a relay and several exposures, validated by pydantic. tunnel(1) describes every key."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidationInfo,
    create_model,
    field_validator,
    model_validator,
)

from tunneld.agent.config import ExposureConfig, plan_of
from tunneld.agent.health import HEALTHY_AFTER, INTERVAL, MAX_CHECKS, PATH, TIMEOUT, UNHEALTHY_AFTER
from tunneld.agent.pool import PARKED_KEEPALIVE, PARKED_MAX_AGE
from tunneld.agent.shutdown import DRAIN_WITHIN
from tunneld.config.certificates import LETS_ENCRYPT
from tunneld.config.file import load_as, toml
from tunneld.config.paths import locate
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
from tunneld.policy.networks import parse_networks
from tunneld.policy.options import OPTIONS, Option, parse_boolean, parse_client_port, parse_count, parse_seconds
from tunneld.policy.rates import Rate
from tunneld.tls.pins import parse_pins

CheckCount = Annotated[int, Field(ge=1, le=MAX_CHECKS)]
PoolSize = Annotated[int, Field(ge=1, le=100_000)]
VisitorLimit = Annotated[int | None, Field(ge=1, le=1_000_000)]
OptionalSeconds = Annotated[float | None, Field(ge=MILLISECOND, le=YEAR, allow_inf_nan=False)]
OptionalPort = Annotated[int | None, Field(ge=1, le=MAX_PORT)]
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # what openTunnel takes as a name


def _parsed_by(parse: Callable[[str], object]) -> AfterValidator:
    """Validates a string with a parser; the value stays the string."""

    def check(value: str) -> str:
        try:
            parse(value)
        except UsageError as error:
            raise ValueError(str(error)) from None
        except ValueError as error:
            raise ValueError(f"{literal(value)} is {error}") from None
        return value

    return AfterValidator(check)


def _port_as_text(value: object) -> object:
    """Accept a port that is written as a number."""
    return str(value) if type(value) is int else value


def path_of_request(text: str) -> str:
    """Return `text` if it can be the path of an HTTP request. Raises `ValueError`."""
    if not (text.startswith("/") and text.isascii() and text.isprintable() and " " not in text):
        raise ValueError(
            f"{literal(text)} is not a path for an HTTP request: it must start with / and contain no spaces"
        )
    return text


class RelayTable(Table):
    """The table `[relay]`: how to reach it, and with which credential. Missing keys come from the environment, like
    missing options of a command.
    """

    where: Annotated[str, _parsed_by(parse_relay)] | None = None
    ca: File | None = None
    pin: Annotated[str, _parsed_by(parse_pins)] | None = None
    insecure: bool = False
    cert: File | None = None
    key: File | None = None
    credential: str | None = None
    secret_file: File | None = None
    timeout: Seconds = 10.0

    _locate = field_validator("ca", "cert", "key", "secret_file")(locate)


def _option_field(option: Option) -> tuple[Any, Any]:
    """The type and the default of the key for an option of openTunnel."""
    types: dict[Any, tuple[Any, Any]] = {
        parse_boolean: (bool, False),
        parse_client_port: (OptionalPort, None),
        parse_count: (VisitorLimit, None),
        parse_networks: (NetworkList, ()),
        parse_seconds: (OptionalSeconds, None),
        Rate.parse: (VisitorRate | None, None),
    }
    return types.get(option.read, (Annotated[str, _parsed_by(option.read)] | None, None))


if TYPE_CHECKING:
    OptionTable = Table
else:
    OptionTable = create_model(
        "OptionTable",
        __base__=Table,
        **{key: _option_field(option) for key, option in OPTIONS.items() if option.group},
    )


class ExposureTable(OptionTable):
    """A table `[expose.NAME]`: one local server. The keys that are options of openTunnel come from `OPTIONS`."""

    target: Annotated[str, _parsed_by(Target.parse), BeforeValidator(_port_as_text)]
    scheme: Literal["tcp", "http", "https"] = "tcp"
    backend: Literal["webmux", "tcp", "egtp"] | None = None
    secure: Literal["yes", "key", "no"] | None = None
    linger: Seconds = 60.0
    drain_timeout: SecondsOrNone = DRAIN_WITHIN
    pool: PoolSize = 8
    max_pool: PoolSize = 200
    pool_keepalive: Seconds = PARKED_KEEPALIVE
    pool_max_age: Seconds = PARKED_MAX_AGE
    proxy_protocol: bool = False
    https_here: bool = False
    acme_directory: str = LETS_ENCRYPT
    acme_ca_file: File | None = None
    acme_agree: bool = False
    acme_contact: str = ""
    health: Literal["tcp", "http"] | None = None
    health_path: Annotated[str, AfterValidator(path_of_request)] = PATH
    health_interval: Seconds = INTERVAL
    health_timeout: Seconds = TIMEOUT
    unhealthy_after: CheckCount = UNHEALTHY_AFTER
    healthy_after: CheckCount = HEALTHY_AFTER
    unhealthy: Literal["answer", "withdraw", "tell"] = "answer"
    auth: Annotated[tuple[str, ...], Field(strict=False, repr=False)] = ()
    auth_file: File | None = None

    _locate = field_validator("auth_file", "acme_ca_file")(locate)

    @model_validator(mode="after")
    def _check_combination(self) -> ExposureTable:
        try:
            self.plan("x")
        except UsageError as error:
            raise ValueError(str(error)) from None
        return self

    def plan(self, name: str) -> ExposureConfig:
        """Return the configuration of this exposure. `name` is the table's, and the tunnel's if it has no own one."""
        values: dict[str, Any] = self.model_dump()
        for key, value in values.items():
            if isinstance(value, tuple) and key != "auth":  # networks
                values[key] = ",".join(value) or None
        return plan_of({**values, "name": values["name"] or name}, str)


class ExposeFile(Table):
    """A whole expose.toml."""

    relay: RelayTable = RelayTable()
    expose: dict[str, ExposureTable] = Field(default_factory=dict)

    @field_validator("expose")
    @classmethod
    def _check_names(cls, value: dict[str, ExposureTable], info: ValidationInfo) -> dict[str, ExposureTable]:
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
        """The configurations of the exposures, by name."""
        return {name: table.plan(name) for name, table in self.expose.items()}


def load_plans(path: Path) -> ExposeFile:
    """Read expose.toml. Relative paths in it start from its folder. Raises `ConfigError`, one sentence per mistake."""
    return load_as(ExposeFile, path, _parse)


def _parse(content: bytes, folder: Path) -> ExposeFile:
    return ExposeFile.model_validate({"expose": {}, **toml(content)}, context=Loading(folder))
