"""Makes the agent a single file: `tunnel` with the pure Python packages it needs, in a zip that any Python from 3.11 on
runs. What only the relay needs is left out.

    python packaging/agent.py dist/tunnel.pyz
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipapp
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "tunneld"
PURE = ("trio", "attrs", "idna", "outcome", "sniffio", "sortedcontainers", "h11", "segno")
"""Packages of the index that the agent imports, each in pure Python; h11 for --inspect, segno for QR codes."""
RELAY_ONLY = ("acme", "auth", "backends", "control", "daemon", "directory", "http", "sites", "tunnel")
"""Our packages that the agent does not import; tests/house/test_imports.py holds it to that."""
EARLIEST = 315532800
"""1980-01-01, the earliest time that a zip can store."""


def collect(folder: Path) -> None:
    """Put everything into a folder: the packages from the index, and ours."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    pure = ["--no-deps", "--no-compile", "--only-binary", ":all:", "--platform", "any", "--python-version", "3.11"]
    subprocess.run([*pip, "install", *pure, "--target", str(folder), *PURE], check=True)
    shutil.rmtree(folder / "bin", ignore_errors=True)
    for tests in folder.rglob("_tests"):
        shutil.rmtree(tests)
    shutil.copytree(SOURCE, folder / "tunneld", ignore=shutil.ignore_patterns("__pycache__"))
    for package in RELAY_ONLY:
        shutil.rmtree(folder / "tunneld" / package)
    (folder / "__main__.py").write_text("import sys\n\nfrom tunneld.cli.tunnel import main\n\nsys.exit(main())\n")


def stamp(folder: Path) -> None:
    """Give all files one time, so that the same commit makes the same file."""
    moment = max(int(os.environ.get("SOURCE_DATE_EPOCH", "0")), EARLIEST)
    for path in folder.rglob("*"):
        os.utime(path, (moment, moment))


def main() -> None:
    """Write the file that the command line names."""
    target = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        collect(Path(folder))
        stamp(Path(folder))
        zipapp.create_archive(folder, target, interpreter="/usr/bin/env python3", compressed=True)


if __name__ == "__main__":
    main()
