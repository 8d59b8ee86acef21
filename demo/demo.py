"""The demo: a web server that only dials out, reachable through a tunnel.

    browser ──► tunneld ◄── tunnel expose ──► web server
                (public)    (beside the server, dials out)

`tunneld` and `tunnel expose` are the real programs, as child processes, with the shipped configuration. With
`--once` a client fetches the page through the tunnel, and the exit status says whether it got it.
"""

from __future__ import annotations

import argparse
import http.server
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import tomllib
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "config" / "tunnel.toml"
BIN = Path(sys.executable).parent
PATIENCE = 30.0
"""Seconds for each program to start, to answer and to end; a cold start on a small machine takes two or three."""

LOOK = 0.1
"""Seconds between two looks at whether a program that is starting has given up."""

PAGE = b"""<!doctype html><meta charset="utf-8"><title>tunneld</title>
<h1>Hello from behind the firewall</h1>
<p>This page came through a tunnel: its server only ever dialled out.</p>
"""


class DemoError(Exception):
    """What did not work, and why."""


class Page(http.server.BaseHTTPRequestHandler):
    """The hidden server: one page."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Answer with the page."""
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(PAGE)))
        self.end_headers()
        self.wfile.write(PAGE)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - as above
        """Say nothing: the agent tells of visitors."""


@contextmanager
def web_server() -> Iterator[int]:
    """A small real HTTP server on a free port of this machine; gives the port."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@contextmanager
def relay() -> Iterator[None]:
    """`tunneld` with the shipped configuration, ready when the block begins: it says so as it would to systemd."""
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready:
        ready.bind(f"{folder}/notify")
        ready.settimeout(LOOK)
        environment = os.environ | {"NOTIFY_SOCKET": f"{folder}/notify", "STATE_DIRECTORY": f"{folder}/state"}
        command = [str(BIN / "tunneld"), "--config", str(CONFIG), "--log-level", "warning"]
        with child(command, environment) as process:
            wait_until_ready(process, ready)
            yield


def wait_until_ready(process: subprocess.Popen[bytes], ready: socket.socket) -> None:
    """Return when the daemon has said that it is ready. Raises `DemoError`."""
    for _ in range(int(PATIENCE / LOOK)):
        with suppress(TimeoutError):
            if b"READY=1" in ready.recv(4096):
                return
        if process.poll() is not None:
            raise DemoError(f"tunneld did not start: exit status {process.returncode}")
    raise DemoError(f"tunneld was not ready in {PATIENCE:.0f} s")


@contextmanager
def child(
    command: list[str], environment: dict[str, str], stdout: int | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A child process that is asked to end, and waited for, when the block does."""
    process = subprocess.Popen(command, env=environment, stdout=stdout)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def main(*, once: bool) -> None:
    """Start all three, show the address, stay until Ctrl-C (or fetch once)."""
    control = tomllib.loads(CONFIG.read_text())["control"]
    with web_server() as port, relay():
        command = [
            str(BIN / "tunnel"),
            "expose",
            str(port),
            "--http",
            "--relay",
            f"{control['host']}:{control['port']}",
        ]
        if once:
            with child([*command, "--quiet"], dict(os.environ), subprocess.PIPE) as agent:
                fetch(agent)
        else:
            with child(command, dict(os.environ)) as agent:
                if agent.wait():
                    raise DemoError(f"tunnel expose ended with exit status {agent.returncode}")


def fetch(agent: subprocess.Popen[bytes]) -> None:
    """Read the public URL from the agent, get the page as any client would, print it."""
    assert agent.stdout is not None
    url = agent.stdout.readline().decode().strip()
    if not url:
        raise DemoError(f"tunnel expose gave no address: exit status {agent.wait()}")
    print(url, flush=True)
    with urllib.request.urlopen(url, timeout=PATIENCE) as answer:
        page = answer.read()
    if page != PAGE:
        raise DemoError(f"{url} answered {len(page)} octets that are not the page")
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
