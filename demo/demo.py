"""The demo: make a local web server reachable through a tunnel.

    browser ──► tunneld ◄── tunnel expose ──► web server
                (public)    (on the machine of the server)

`tunneld` and `tunnel expose` run as child processes, with the shipped configuration except for free ports. TUNNEL_*
variables of the environment are ignored. With `--once`, the page is fetched once through the tunnel, and the exit
status is 0 if that succeeded.
"""

from __future__ import annotations

import argparse
import http.server
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import tomllib
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import tomli_w

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "config" / "tunnel.toml"
BIN = Path(sys.executable).parent
TIMEOUT = 30.0
"""Seconds for each program to start, to answer and to end; a cold start on a small machine takes two or three."""

PAGE = b"""<!doctype html><meta charset="utf-8"><title>tunneld</title>
<h1>Hello from behind the firewall</h1>
<p>This page came through a tunnel: its server only made an outgoing connection.</p>
"""


class DemoError(Exception):
    """A program failed, or the page did not arrive."""


class Page(http.server.BaseHTTPRequestHandler):
    """The local server, which has one page."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Send the page."""
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(PAGE)))
        self.end_headers()
        self.wfile.write(PAGE)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name in the base class
        """Log nothing, since the agent reports visitors."""


@contextmanager
def web_server() -> Iterator[int]:
    """Run the local server on a free port, and yield the port."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def environment() -> dict[str, str]:
    """Return the environment without the variables that configure other tunnels of this user."""
    return {name: value for name, value in os.environ.items() if not name.startswith("TUNNEL_")}


@contextmanager
def relay() -> Iterator[str]:
    """Run `tunneld`, ready when the block begins, and yield the address of its control port."""
    settings = tomllib.loads(CONFIG.read_text())
    for service in ("control", "http", "webmux"):
        settings[service]["port"] = 0
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "tunnel.toml")
        config.write_text(tomli_w.dumps(settings))
        command = [str(BIN / "tunneld"), "--config", str(config), "--log-format", "json"]
        with child(command, environment() | {"STATE_DIRECTORY": f"{folder}/state"}, stderr=subprocess.PIPE) as process:
            log = Log(process)
            yield log.wait_until_ready()


class Log:
    """Reads the log of the daemon, and prints errors, or all of it if the daemon does not start."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._lines: list[str] = []
        self._control = ""
        self._settled = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()

    def wait_until_ready(self) -> str:
        """Wait until the daemon is ready, and return the address of its control port. Raises `DemoError`."""
        if not self._settled.wait(TIMEOUT):
            raise DemoError(f"tunneld was not ready within {TIMEOUT:.0f} s")
        if not self._control:
            print(*self._lines, sep="\n", file=sys.stderr)
            raise DemoError(f"tunneld did not start: exit status {self._process.wait(TIMEOUT)}")
        return self._control

    def _read(self) -> None:
        assert self._process.stderr is not None
        control = ""
        for line in map(bytes.decode, self._process.stderr):
            self._lines.append(line.rstrip())
            entry = json.loads(line) if line.startswith("{") else {"event": line, "level": "error"}
            if entry["event"] == "control listens":
                control = entry["uri"].removeprefix("tcp://")
            elif entry["event"] == "ready":
                self._control = control
                self._settled.set()
            elif entry["level"] in {"error", "critical"} and self._settled.is_set():
                print(line.rstrip(), file=sys.stderr)
        self._settled.set()


@contextmanager
def child(
    command: list[str], variables: dict[str, str], *, stdout: int | None = None, stderr: int | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a child process, and end it with SIGTERM when the block ends."""
    process = subprocess.Popen(command, env=variables, stdout=stdout, stderr=stderr)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def main(*, once: bool) -> None:
    """Start server, relay and agent, and run until Ctrl-C, or until the page was fetched once."""
    with web_server() as port, relay() as control:
        command = [str(BIN / "tunnel"), "expose", str(port), "--http", "--relay", control]
        if once:
            with child([*command, "--quiet"], environment(), stdout=subprocess.PIPE) as agent:
                fetch(agent)
        else:
            with child(command, environment()) as agent:
                if agent.wait():
                    raise DemoError(f"tunnel expose failed with exit status {agent.returncode}")


def fetch(agent: subprocess.Popen[bytes]) -> None:
    """Read the public URL that the agent prints, fetch the page, and print it. Raises `DemoError`."""
    assert agent.stdout is not None
    url = agent.stdout.readline().decode().strip()
    if not url:
        raise DemoError(f"tunnel expose printed no address and failed with exit status {agent.wait()}")
    print(url, flush=True)
    with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
        page = answer.read()
    if page != PAGE:
        raise DemoError(f"{url} returned {len(page)} bytes that are not the page")
    print(page.decode(), end="")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--once", action="store_true", help="fetch the page through the tunnel and exit")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main(once=parser.parse_args().once)
    except KeyboardInterrupt:
        print()
    except (DemoError, OSError) as error:
        sys.exit(f"demo: {error}")
