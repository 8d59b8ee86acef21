"""The types of the values in items of the control protocol, by their keys: there, all of them are text. Pure."""

from __future__ import annotations

from collections.abc import Mapping

Typed = str | int | bool
"""A value of an item, as JSON has it."""

PROCESS = frozenset({"descriptors", "max_descriptors", "pid", "penalised", "strangers", "strangers_refused", "uptime"})
TRAFFIC = frozenset(
    {
        *("bandwidth", "down", "max_per_source", "max_visitors", "parked", "quota", "refused", "served", "up"),
        *("visitors", "waiting", "up_rate", "down_rate"),  # the rates are those of `tunnel top`
    }
)
PORTS = frozenset({"client_port", "server_port"})
CERTIFICATE = frozenset({"expires", "failures", "renews"})
COUNTS = frozenset({"age", "agents", "count", "left", "opened", "reservations", "seconds", "tasks", "tunnels"})
INTEGER_KEYS = PROCESS | TRAFFIC | PORTS | CERTIFICATE | COUNTS
"""Keys with values that are integers."""
BOOLEAN_KEYS = frozenset({"persist", "needs_restart", "failed"})
BOOLEANS = {"yes": True, "no": False}
MAX_DIGITS = 20
"""Digits of a 64-bit number: a relay counts bytes with no more."""


def typed_record(record: Mapping[str, str]) -> dict[str, Typed]:
    """A record with numbers and booleans for the keys that have such values."""
    return {key: typed(key, value) for key, value in record.items()}


def typed(key: str, value: str) -> Typed:
    """The value of a key. Text that is not what the key has stays text: the relay may be a newer one."""
    if key in INTEGER_KEYS and is_count(value.removeprefix("-")):
        return int(value)
    return BOOLEANS.get(value, value) if key in BOOLEAN_KEYS else value


def is_count(value: str) -> bool:
    """Whether a value is a count of at most `MAX_DIGITS` digits. Python refuses to read numbers of any length."""
    return value.isascii() and value.isdecimal() and len(value) <= MAX_DIGITS
