"""What the schema may know of the file that is being loaded: the validation context of pydantic."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Loading:
    """Absent where settings are made by a program: then nothing is read from the disk."""

    folder: Path  # that relative paths start from
    credentials: bool = False  # whether the file has any [[credential]]: a lock of another table asks
