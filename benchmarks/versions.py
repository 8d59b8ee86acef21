"""What programs say of themselves, and the line about the machine."""

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
from tunneld.cli.build import BUILD

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
    """What a program prints when asked with an option. Raises `BenchError`."""
    answer = subprocess.run(
        [need(program), option], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=10
    )
    return answer.stdout + answer.stderr


def versions() -> dict[str, str]:
    """The versions of ours, of the Python below it, and of the programs that are there."""
    found = {"tunneld": BUILD, "python": platform.python_version(), "trio": metadata.version("trio")}
    for name, (program, option) in COMMANDS.items():
        if find(program) is not None:
            number = re.search(r"(?<![\d:])\d+\.\d+[\w.]*", asked(program, option))
            found[name] = number[0] if number else "?"
    return found


def machine() -> dict[str, str | int | float]:
    """Where this ran. `load` is what others wanted of the processors in the minute before."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "processor": _processor(),
        "kernel": f"{platform.system()} {platform.release()}",
        "congestion control": congestion_control(),
        "load": round(os.getloadavg()[0], 2),
    }


def nginx_module(name: str) -> str:
    """What a configuration of nginx needs at its top to use a module. Raises `BenchError`."""
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
