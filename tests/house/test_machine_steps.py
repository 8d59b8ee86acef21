"""The steps of tests/machine run in a machine that has only their folder, and nothing else of the repository."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

INSIDE = Path(__file__).parents[1] / "machine" / "inside"


def test_the_steps_can_be_listed_outside_the_repository(tmp_path: Path) -> None:
    shutil.copytree(INSIDE, tmp_path / "inside")
    command = [sys.executable, "-m", "inside", "--list"]
    done = subprocess.run(command, cwd=tmp_path, env={}, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "systemctl stop drains" in done.stdout
