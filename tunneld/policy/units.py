"""Sizes, times and counts as people read them. Pure; both the daemon and the commands use these."""

from __future__ import annotations

import re

KIB = 1024
YEAR = 365 * 24 * 3600.0
"""Seconds: the longest time of a setting."""
SIZE_UNITS = ("KiB", "MiB", "GiB", "TiB", "PiB")


def format_size(size: int) -> str:
    """Format a number of bytes with three significant digits at most: `512 B`, `1.5 KiB`, `12 MiB`."""
    number, unit = float(size), "B"
    for larger in SIZE_UNITS:
        if number < KIB - 0.5:
            break
        number, unit = number / KIB, larger
    return f"{number:.1f} {unit}" if unit != "B" and number < 9.95 else f"{number:.0f} {unit}"


def format_duration(total: int) -> str:
    """Format a number of seconds: `12s`, `3m05s`, `2h10m`, `5d03h`."""
    minutes, hours, days = total // 60, total // 3600, total // 86400
    if days:
        return f"{days}d{hours % 24:02}h"
    if hours:
        return f"{hours}h{minutes % 60:02}m"
    return f"{minutes}m{total % 60:02}s" if minutes else f"{total}s"


def parse_duration(text: str) -> int:
    """Read a number of seconds, or of minutes, hours or days: `90`, `90s`, `30m`, `2h`, `7d`. Raises `ValueError`."""
    match = re.fullmatch(r"([1-9][0-9]{0,8})([smhd]?)", text)
    if match is None:
        raise ValueError("not a time such as 90s, 30m, 2h or 7d")
    return int(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]


def parse_positive_seconds(text: str) -> float:
    """Read a number of seconds. Raises `ValueError`."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= YEAR:
        raise ValueError("not a number of seconds above 0 and up to one year")
    return value


def parse_seconds_or_zero(text: str) -> float:
    """Read a number of seconds that may be 0. Raises `ValueError`."""
    return 0.0 if text in {"0", "0.0"} else parse_positive_seconds(text)


def count(number: int, noun: str, plural: str = "") -> str:
    """`1 tunnel`, `2 tunnels`; `plural` is for nouns that take no s."""
    return f"{number} {noun}" if number == 1 else f"{number} {plural or f'{noun}s'}"
