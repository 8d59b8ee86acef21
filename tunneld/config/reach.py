"""Whether a face may listen where its listener comes from elsewhere, systemd for example, and not from its `host`."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from tunneld.config.problems import sentences
from tunneld.config.schema import ControlSettings, HttpSettings, Settings
from tunneld.config.values import Loading
from tunneld.errors import ConfigError


def check_reach(settings: Settings, face: str, host: str) -> None:
    """Hold the face to what its table would have to say if `host` were its own. Raises `ConfigError`."""
    table: ControlSettings | HttpSettings
    if face == "control":
        table = settings.control
    elif face == "http":
        table = settings.http
    else:
        return  # whoever comes there must know a key or a credential
    values = {**table.model_dump(), "host": host}
    try:
        type(table).model_validate(values, context=Loading(Path("/"), credentials=bool(settings.credential)))
    except ValidationError as error:
        raise ConfigError([f"{face}.{problem}" for problem in sentences(error, type(table))]) from None
