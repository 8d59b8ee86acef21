"""Which build this is: what every byte and every visitor passes may be compiled from the same files (setup.py)."""

from __future__ import annotations

from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from tunneld import __version__

COMPILED = any((Path(__file__).parents[1] / "engine" / f"pump{suffix}").exists() for suffix in EXTENSION_SUFFIXES)
"""Whether the data plane is."""

BUILD = f"{__version__} (compiled)" if COMPILED else __version__
"""What `--version` says."""
