"""Inside the machine: goes through all steps, or those that /mnt/steps has a word of, and says how each went."""

from __future__ import annotations

import sys
import time
import traceback
from importlib import import_module
from pathlib import Path

from .steps import STEPS
from .tools import WrongError, sh

MODULES = ("relay", "agents", "restarts", "sockets")


def main() -> None:
    """Print a line for each step; the last one is read outside."""
    for module in MODULES:
        import_module(f"{__package__}.{module}")
    words = Path("/mnt/steps").read_text().split()
    failed = 0
    for name, step in STEPS.items():
        if not step.always and words and not any(word in name for word in words):
            continue
        began = time.monotonic()
        try:
            for remark in step.run() or ():
                print(f"         {remark}")
            outcome = "ok    "
        except WrongError as error:
            outcome, failed = f"FAILED {error}\n      ", failed + 1
            print(sh("journalctl -b -n 40 _UID=1000 + _UID=999 + _PID=1 -o short-monotonic --no-pager", status=None))
        except Exception:
            traceback.print_exc(file=sys.stdout)
            outcome, failed = "FAILED", failed + 1
        print(f"{outcome} {name} ({time.monotonic() - began:.0f} s)")
    print("all steps passed" if not failed else f"{failed} steps failed")


main()
