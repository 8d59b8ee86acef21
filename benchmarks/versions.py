"""Versions of the programs, and facts about the machine."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path

from benchmarks.network import congestion_control
from benchmarks.processes import BenchError, find, need
from tunneld.cli.common import BUILD

COMMANDS = {
    "haproxy": ("haproxy", "-v"),
    "nginx": ("nginx", "-v"),
    "ssh": ("ssh", "-V"),
    "socat": ("socat", "-V"),
    "rathole": ("rathole", "--version"),
    "frp": ("frps", "--version"),
    "chisel": ("chisel", "--version"),
    "bore": ("bore", "--version"),
    "wrk": ("wrk", "-v"),
}


@cache
def asked(program: str, option: str) -> str:
    """Return the output of a program called with an option. Raises `BenchError`."""
    answer = subprocess.run(
        [need(program), option], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=10
    )
    return answer.stdout + answer.stderr


def versions() -> dict[str, str]:
    """Return the versions of tunneld, Python, Trio and the installed peers."""
    found = {"tunneld": BUILD, "python": platform.python_version(), "trio": metadata.version("trio")}
    for name, (program, option) in COMMANDS.items():
        if find(program) is not None:
            number = re.search(r"(?<![\d:])\d+\.\d+[\w.]*", asked(program, option))
            found[name] = number[0] if number else "?"
    return found


def machine() -> dict[str, str | int | float]:
    """Return facts about the machine. `load` is the load average of the last minute."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "processor": _processor(),
        "kernel": f"{platform.system()} {platform.release()}",
        "congestion control": congestion_control(),
        "load": round(os.getloadavg()[0], 2),
    }


def nginx_module(name: str) -> str:
    """Return the line that loads an nginx module; empty if it is built in. Raises `BenchError` if there is none."""
    built = asked("nginx", "-V")
    if f"--with-{name}=dynamic" not in built:
        if f"--with-{name}" not in built:
            raise BenchError(f"nginx has no {name} module")
        return ""
    folder = re.search(r"--modules-path=(\S+)", built)
    path = Path(folder[1] if folder else "modules") / f"ngx_{name}_module.so"
    if folder and not path.exists():
        raise BenchError(f"nginx has no {name} module: {path} is missing")
    return f"load_module {path};\n"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
