"""Runs a relay and an agent as their users would, exposes a web server, and fetches its page from the public address.
Needs only the standard library: it runs in bare systems.

    python3 smoke.py --relay "tunneld --config ..." --agent "python3 tunnel.pyz" --line FILE

FILE has the line that `tunneld init` printed.
"""

from __future__ import annotations

import argparse
import http.server
import os
import shlex
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Sequence
from pathlib import Path

PAGE = b"a page from behind NAT\n"


class Site(http.server.BaseHTTPRequestHandler):
    """The local server."""

    def do_GET(self) -> None:
        """Send the page."""
        self.send_response(200)
        self.send_header("Content-Length", str(len(PAGE)))
        self.end_headers()
        self.wfile.write(PAGE)

    def log_message(self, *_arguments: object) -> None:
        """Keep the log of the programs readable."""


def started(command: Sequence[str], says: str, **options: object) -> tuple[subprocess.Popen[str], str]:
    """Start a program, and wait until it prints a line with these words. Returns it and the line."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)  # type: ignore[call-overload]
    for line in process.stdout:
        print(f"  {line}", end="", flush=True)
        if says in line:
            threading.Thread(target=process.stdout.read, daemon=True).start()  # so that it never waits for a reader
            return process, line.strip()
    sys.exit(f"{shlex.join(command)} ended with status {process.wait()}")


def main() -> None:
    """Run everything once; exits with status 1 where something fails."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--relay", required=True)
    parser.add_argument("--agent", required=True)
    parser.add_argument("--line", required=True, type=Path)
    options = parser.parse_args()
    site = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site)
    threading.Thread(target=site.serve_forever, daemon=True).start()
    secret, _tunnel, _expose, _port, *rest = shlex.split(options.line.read_text())
    environment = {**os.environ, "TUNNEL_SECRET": secret.partition("=")[2]}
    expose = [*shlex.split(options.agent), "expose", str(site.server_port), "--http", *rest]
    relay, _ = started(shlex.split(options.relay), "ready")
    try:
        agent, address = started(expose, "http://", env=environment)
        try:
            page = urllib.request.urlopen(address.split()[-1], timeout=20).read()
        finally:
            agent.terminate()
        if page != PAGE or agent.wait(30) != 0:
            sys.exit(f"expected {PAGE!r} and an agent that ends with 0, not {page!r} and {agent.returncode}")
    finally:
        relay.terminate()
    if relay.wait(60) != 0:
        sys.exit(f"the relay ended with status {relay.returncode}")
    print("  the page arrived, and both programs ended well")


if __name__ == "__main__":
    main()
