"""Turns Pydantic's errors into sentences for operators: key path, reason, and the nearest valid key.

control.port: 70000 is not between 0 and 65535
tunnels.pairing_timout: unrecognized key; did you mean pairing_timeout?
log.level: "verbose" is not one of debug, info, warning, error
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from tunneld.config.http import HttpSettings
from tunneld.config.keys import keys, schema_path, tables
from tunneld.config.schema import ControlSettings, Settings
from tunneld.config.values import Loading, Table
from tunneld.config.wording import dotted, literal, unrecognized
from tunneld.errors import ConfigError

NOUNS = {
    "int_type": "an integer",
    "int_parsing_size": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a string in quotes",
    "path_type": "a path in quotes",
    "tuple_type": "an array",
    "model_type": "a table",
    "dict_type": "a table",
    "model_attributes_type": "a table",
}
BOUNDS = {"greater_than", "greater_than_equal", "less_than_equal", "finite_number"}


def sentences(error: ValidationError, root: type[Table] = Settings) -> list[str]:
    """One sentence per error in a file that was validated as a `root`, in schema order, without the name of the
    file.
    """
    details = error.errors(include_url=False)
    return [f"{dotted(detail['loc'])}: {_reason(detail, root)}" for detail in details]


def _reason(detail: ErrorDetails, root: type[Table]) -> str:
    kind, path, value = detail["type"], detail["loc"], detail["input"]
    match kind:
        case "extra_forbidden":
            return _unrecognized(path, "table" if isinstance(value, dict) else "key", root)
        case "missing":
            return "missing, and it has no default"
        case "literal_error":
            return f"{literal(value)} is not one of {', '.join(choices(_field(path, root)))}"
        case "value_error":
            return str(detail["ctx"]["error"])
        case _ if kind in BOUNDS or (kind == "float_type" and type(value) is int):  # an integer too large for a float
            field = _field(path, root)
            lowest, highest = bounds(field)
            if any(hasattr(mark, "gt") for mark in field.metadata):
                return f"{literal(value)} is not above {lowest} and at most {highest}"
            return f"{literal(value)} is not between {lowest} and {highest}"
        case _ if kind in NOUNS:
            return f"{literal(value)} is not {NOUNS[kind]}"
        case _:
            return detail["msg"][:1].lower() + detail["msg"][1:]


def bounds(field: FieldInfo) -> tuple[str, str]:
    """The lowest and the highest value of a numeric key, as printed; or the bound that a value must be above."""
    lowest = next(getattr(mark, "ge", getattr(mark, "gt", None)) for mark in field.metadata)
    highest = next(mark.le for mark in field.metadata if hasattr(mark, "le"))
    return f"{lowest:.12g}", f"{highest:.12g}"


def choices(field: FieldInfo) -> list[str]:
    """The words that a key accepts."""
    kinds = get_args(field.annotation)
    return [word for kind in kinds for word in get_args(kind) or (kind,) if isinstance(word, str)]


def _field(path: Sequence[str | int], root: type[Table]) -> FieldInfo:
    """The field of the schema for a key path; an index belongs to the key of its array."""
    name = schema_path(path, root)
    return next(key.field for key in keys(root) if key.path == name)


def _unrecognized(path: Sequence[str | int], kind: str, root: type[Table]) -> str:
    *outer, name = [part for part in path if isinstance(part, str)]
    own_keys = list(dict(tables(root))[schema_path(outer, root)].model_fields)
    other_keys = {key.path.rpartition(".")[2]: key.path for key in reversed(list(keys(root)))}  # the first wins
    return unrecognized(name, kind, ".".join(outer), own_keys, other_keys)


def check_reach(settings: Settings, service: str, host: str) -> None:
    """Raise `ConfigError` unless `service` may listen on `host`, where its listener was passed in, by systemd for
    example: the rules for a configured `host` apply.
    """
    table: ControlSettings | HttpSettings
    if service == "control":
        table = settings.control
    elif service == "http":
        table = settings.http
    else:
        return  # the other ports always require a key or a credential
    values = {**table.model_dump(), "host": host}
    try:
        type(table).model_validate(values, context=Loading(Path("/"), credentials=bool(settings.credential)))
    except ValidationError as error:
        raise ConfigError([f"{service}.{problem}" for problem in sentences(error, type(table))]) from None
