"""Validators for paths: made absolute from the folder of the configuration, and readable before the daemon is ready.

The schema calls these functions. They read the disk only while a file is being loaded; then the validation context is a
`Loading`, with the folder that relative paths start from.
"""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import ValidationInfo

from tunneld.config.toml_file import readable
from tunneld.config.values import Loading
from tunneld.config.wording import literal


def locate(value: Path | None, info: ValidationInfo) -> Path | None:
    """The path, made absolute from the folder of the configuration file. Raises `ValueError` if it cannot be read.

    Symbolic links are not resolved: they are how certificates are renewed.
    """
    if value is None or info.context is None:
        return value
    loading: Loading = info.context
    return readable(loading.folder / value)


def absolute_path(value: Path | None, info: ValidationInfo) -> Path | None:
    """The path of a file or folder, made absolute in the same way. It need not exist. Raises `ValueError`."""
    if value is None:
        return value
    if value == Path():
        raise ValueError("the path is empty; omit the key for the default")
    loading: Loading | None = info.context
    path = value if loading is None else loading.folder / value
    try:
        os.fsencode(path).decode()
    except ValueError:
        raise ValueError(f"{literal(path)} is not a path: it is not UTF-8") from None
    if "\0" in str(path):
        raise ValueError(f"{literal(path)} is not a path: it contains a zero byte")
    return path
