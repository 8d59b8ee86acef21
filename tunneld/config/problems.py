"""Pydantic's errors as sentences for the person who wrote the file: key path, reason, and the nearest valid key.

control.port: 70000 is not between 0 and 65535
tunnels.pairing_timout: unrecognized key; did you mean pairing_timeout?
log.level: "verbose" is not one of debug, info, warning, error
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import get_args

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from tunneld.config.keys import keys, schema_path, tables
from tunneld.config.schema import Settings
from tunneld.config.values import Table, dotted, literal

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
BOUNDS = {"greater_than_equal", "less_than_equal", "finite_number"}


def sentences(error: ValidationError, root: type[Table] = Settings) -> list[str]:
    """One sentence for each mistake in a file that is to be a `root`, in the order of the schema, without the file's
    name.
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
        case _ if kind in BOUNDS or (kind == "float_type" and type(value) is int):  # an integer beyond all floats
            lowest, highest = bounds(_field(path, root))
            return f"{literal(value)} is not between {lowest} and {highest}"
        case _ if kind in NOUNS:
            return f"{literal(value)} is not {NOUNS[kind]}"
        case _:
            return detail["msg"][:1].lower() + detail["msg"][1:]


def bounds(field: FieldInfo) -> tuple[str, str]:
    """The lowest and the highest value of a number's key, as printed."""
    lowest = next(mark.ge for mark in field.metadata if hasattr(mark, "ge"))
    highest = next(mark.le for mark in field.metadata if hasattr(mark, "le"))
    return f"{lowest:.12g}", f"{highest:.12g}"


def choices(field: FieldInfo) -> list[str]:
    """The words that a key takes, which may also be left out."""
    kinds = get_args(field.annotation)
    return [word for kind in kinds for word in get_args(kind) or (kind,) if isinstance(word, str)]


def _field(path: Sequence[str | int], root: type[Table]) -> FieldInfo:
    """The schema's field behind a key path; an index into an array belongs to the array's key or table."""
    name = schema_path(path, root)
    return next(key.field for key in keys(root) if key.path == name)


def _unrecognized(path: Sequence[str | int], kind: str, root: type[Table]) -> str:
    """Very near in its own table or in another; else somewhat near in its own; else what the table has."""
    *outer, name = [part for part in path if isinstance(part, str)]
    table = ".".join(outer)
    siblings = list(dict(tables(root))[schema_path(outer, root)].model_fields)
    elsewhere = {key.path.rpartition(".")[2]: key.path for key in reversed(list(keys(root)))}  # of two, the first
    if near := get_close_matches(name, siblings, n=1, cutoff=0.8):
        hint = f"did you mean {near[0]}?"
    elif far := get_close_matches(name, elsewhere, n=1, cutoff=0.8):
        hint = f"did you mean {elsewhere[far[0]]}?"
    elif near := get_close_matches(name, siblings, n=1):
        hint = f"did you mean {near[0]}?"
    else:
        hint = f"{f'[{table}]' if table else 'the file'} may have {', '.join(siblings)}"
    return f"unrecognized {kind}; {hint}"
