"""The kinds of values that settings take: each is read from the text of a flag, or from a value in a TOML file.

`KeyPlace` is where a value stands in a file. It collects the mistakes, one sentence each, with the path of the key.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunneld.config.toml_file import readable
from tunneld.config.wording import dotted, literal
from tunneld.errors import UsageError
from tunneld.net.endpoint import parse_network

MILLISECOND = 0.001
"""The shortest wait that a scheduler keeps; a smaller value is a mistake."""


class BadValueError(ValueError):
    """A value that a key does not take; the message is a sentence with the value."""


@dataclass(frozen=True, slots=True)
class KeyPlace:
    """A key in a file: the folder of the file, the path of the key, and the list that gets its mistakes."""

    folder: Path
    path: tuple[str | int, ...]
    problems: list[str]

    def below(self, *names: str | int) -> KeyPlace:
        """The key or item with this name in this place."""
        return KeyPlace(self.folder, (*self.path, *names), self.problems)

    def read(self, kind: Kind, value: object) -> Any:
        """Read the value here. Returns None after a mistake."""
        try:
            return kind.from_file(value, self)
        except (ValueError, UsageError) as error:
            self.fail(str(error))
        return None

    def fail(self, reason: str) -> None:
        """Add a mistake."""
        self.problems.append(f"{dotted(self.path)}: {reason}")


class Kind:
    """What values a setting takes."""

    def from_text(self, text: str) -> Any:
        """Read the text of a flag. Raises `ValueError` or `UsageError`."""
        return text

    def from_file(self, value: object, place: KeyPlace) -> Any:
        """Read a value in a file. Raises `ValueError` or `UsageError`, with a sentence."""
        raise NotImplementedError


class Boolean(Kind):
    """A flag without a value; true or false."""

    def from_file(self, value: object, place: KeyPlace) -> Any:
        """See `Kind`."""
        if isinstance(value, bool):
            return value
        raise BadValueError(f"{literal(value)} is not true or false")


@dataclass(frozen=True, slots=True)
class Words(Kind):
    """One of a few words."""

    words: Sequence[str]

    def from_file(self, value: object, place: KeyPlace) -> Any:
        """See `Kind`."""
        if isinstance(value, str) and value in self.words:
            return value
        raise BadValueError(f"{literal(value)} is not one of {', '.join(self.words)}")


@dataclass(frozen=True, slots=True)
class Number(Kind):
    """A number within limits. `read` reads the text of a flag; its own limits may be wider at the lower end."""

    lowest: float
    highest: float
    read: Callable[[str], Any]
    whole: bool = False

    def from_text(self, text: str) -> Any:
        """See `Kind`."""
        return self.read(text)

    def from_file(self, value: object, place: KeyPlace) -> Any:
        """See `Kind`."""
        if isinstance(value, bool) or not isinstance(value, int if self.whole else int | float):
            raise BadValueError(f"{literal(value)} is not {'an integer' if self.whole else 'a number'}")
        if not self.lowest <= value <= self.highest:
            raise BadValueError(f"{literal(value)} is not between {self.lowest:.12g} and {self.highest:.12g}")
        return value if self.whole else float(value)


@dataclass(frozen=True, slots=True)
class Text(Kind):
    """Text that `check` accepts; with `numbers`, an integer in a file stands for its digits. A flag keeps its text,
    while `normal` makes the value in a file.
    """

    check: Callable[[str], object]
    numbers: bool = False
    normal: Callable[[Any], str] | None = None

    def from_text(self, text: str) -> Any:
        """See `Kind`."""
        self.check(text)
        return text

    def from_file(self, value: object, place: KeyPlace) -> Any:
        """See `Kind`."""
        if self.numbers and type(value) is int:
            value = str(value)
        if not isinstance(value, str):
            raise BadValueError(f"{literal(value)} is not a string in quotes")
        try:
            made = self.check(value)
        except ValueError as error:
            raise BadValueError(f"{literal(value)} is {error}") from None
        return value if self.normal is None else self.normal(made)


@dataclass(frozen=True, slots=True)
class Switch(Kind):
    """A flag with a value or without; true, false or that value in a file. Without a value it is empty text."""

    check: Callable[[str], str]

    def from_text(self, text: str) -> Any:
        """See `Kind`."""
        return self.check(text)

    def from_file(self, value: object, place: KeyPlace) -> Any:
        """See `Kind`."""
        if isinstance(value, bool):
            return "" if value else None
        if not isinstance(value, str):
            raise BadValueError(f"{literal(value)} is not true, false or a string in quotes")
        return self.check(value)


class ReadableFile(Kind):
    """A file; a relative path in a file starts from the folder of that."""

    def from_text(self, text: str) -> Any:
        """See `Kind`."""
        return Path(text)

    def from_file(self, value: object, place: KeyPlace) -> Any:
        """See `Kind`."""
        if not isinstance(value, str):
            raise BadValueError(f"{literal(value)} is not a path in quotes")
        return readable(place.folder / value)


@dataclass(frozen=True, slots=True)
class Several(Kind):
    """An array of texts in a file; a flag that may be repeated, or one text for `read`."""

    item: Text
    read: Callable[[str], object] | None = None

    def from_text(self, text: str) -> Any:
        """See `Kind`."""
        if self.read is not None:
            self.read(text)
        return text

    def from_file(self, value: object, place: KeyPlace) -> Any:
        """See `Kind`. With `read`, the value is one text, too."""
        if not isinstance(value, list):
            raise BadValueError(f"{literal(value)} is not an array")
        items = [place.below(index).read(self.item, item) for index, item in enumerate(value)]
        return tuple(items) if self.read is None else ",".join(filter(None, items)) or None


def parse_network_text(text: str) -> object:
    """Read an address or a network. Raises `ValueError`."""
    try:
        return parse_network(text)
    except UsageError:
        raise ValueError("not an address or a network") from None


def parse_any(text: str) -> str:
    """Read any text."""
    return text


def parse_request_path(text: str) -> str:
    """Read the path of an HTTP request. Raises `ValueError`."""
    if not (text.startswith("/") and text.isascii() and text.isprintable() and " " not in text):
        raise ValueError("not a path for an HTTP request: it must start with / and contain no spaces")
    return text
