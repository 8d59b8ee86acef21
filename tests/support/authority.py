"""A certificate authority for tests: Pebble, by the makers of Let's Encrypt, with a name server of its own."""

from __future__ import annotations

import json
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.util import find_spec
from pathlib import Path

import trustme

from tests.support.system import find_program, lacking

if find_spec("acme") is None:
    lacking("the Python package acme is not installed (the extra tunneld[acme])")

START_SECONDS = 30.0

HOOK = """
import json, sys, urllib.request
action, name, value = sys.argv[2:]
body = {"host": name + ".", "value": value}
path = {"present": "set-txt", "remove": "clear-txt"}[action]
urllib.request.urlopen("http://" + sys.argv[1] + "/" + path, json.dumps(body).encode()).read()
"""


@dataclass(frozen=True)
class Authority:
    """A running Pebble. Every name in its DNS is 127.0.0.1; it validates at `http_port` and `tls_port`."""

    directory: str
    ca_file: Path  # of the authority's own HTTPS
    management: str
    dns_management: str
    http_port: int
    tls_port: int
    folder: Path

    @property
    def hook(self) -> list[str]:
        """A program for dns-01."""
        script = self.folder / "hook.py"
        script.write_text(HOOK)
        return [sys.executable, str(script), self.dns_management]

    def issuing_roots(self) -> ssl.SSLContext:
        """A client context that trusts what this authority issues."""
        return ssl.create_default_context(cadata=self._roots())

    def write_roots(self, path: Path) -> None:
        """Write the certificate of this authority, for clients such as curl."""
        path.write_text(self._roots())

    def _roots(self) -> str:
        context = ssl.create_default_context(cafile=self.ca_file)
        with urllib.request.urlopen(f"https://{self.management}/roots/0", context=context) as response:
            found: str = response.read().decode()
            return found


@contextmanager
def running_authority(
    folder: Path, *, reject_nonces: int = 0, validity: int = 7776000, retry_after: int = 1
) -> Iterator[Authority]:
    """Run Pebble in `folder`. `reject_nonces` is the percentage of requests that it refuses for the sake of it,
    `validity` and `retry_after` are in seconds; with 0, it names no time, which it does as a date half of the time.
    Skips the test where Pebble is not installed.
    """
    pebble, names = find_program("pebble"), find_program("pebble-challtestsrv")
    folder.mkdir(exist_ok=True)
    ca = trustme.CA()
    ca.cert_pem.write_to_path(folder / "ca.pem")
    own = ca.issue_cert("localhost", "127.0.0.1")
    own.cert_chain_pems[0].write_to_path(folder / "pebble.pem")
    own.private_key_pem.write_to_path(folder / "pebble.key")
    api, management, dns, dns_management, http_port, tls_port = _free_ports(6)
    config = {
        "listenAddress": f"127.0.0.1:{api}", "managementListenAddress": f"127.0.0.1:{management}",
        "certificate": str(folder / "pebble.pem"), "privateKey": str(folder / "pebble.key"),
        "httpPort": http_port, "tlsPort": tls_port, "keyAlgorithm": "ecdsa",
        "retryAfter": {"authz": retry_after, "order": retry_after},
        "profiles": {"default": {"description": "for tests", "validityPeriod": validity}},
    }  # fmt: skip
    (folder / "pebble.json").write_text(json.dumps({"pebble": config}))
    environment = os.environ | {"PEBBLE_VA_NOSLEEP": "1", "PEBBLE_WFE_NONCEREJECT": str(reject_nonces)}
    commands = [
        [names, "-dnsserver", f"127.0.0.1:{dns}", "-management", f"127.0.0.1:{dns_management}", "-defaultIPv6", "",
         "-http01", "", "-https01", "", "-tlsalpn01", "", "-doh", ""],
        [pebble, "-config", str(folder / "pebble.json"), "-dnsserver", f"127.0.0.1:{dns}"],
    ]  # fmt: skip
    with (folder / "pebble.log").open("wb") as log:
        running = [subprocess.Popen(each, stdout=log, stderr=log, env=environment) for each in commands]
        try:
            for port in (api, dns_management):
                _wait_for(port, folder / "pebble.log")
            yield Authority(
                f"https://localhost:{api}/dir", folder / "ca.pem", f"localhost:{management}",
                f"127.0.0.1:{dns_management}", http_port, tls_port, folder,
            )  # fmt: skip
        finally:
            for process in running:
                process.kill()
                process.wait()


@contextmanager
def http_server(port: int, answers: dict[str, bytes]) -> Iterator[None]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = answers.get(self.path.removeprefix("/.well-known/acme-challenge/"), b"")
            self.send_response(200 if body else 404)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", port), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def tls_server(port: int, choose: Callable[[str], ssl.SSLContext]) -> Iterator[list[str | None]]:
    """Answers handshakes with the context of each name; yields the ALPN protocols that were chosen."""
    chosen: list[str | None] = []

    def select(connection: ssl.SSLSocket | ssl.SSLObject, name: str | None, _context: ssl.SSLContext) -> None:
        connection.context = choose(name or "")

    base = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    base.sni_callback = select
    with socket.create_server(("127.0.0.1", port)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                try:
                    with base.wrap_socket(connection, server_side=True) as wrapped:
                        chosen.append(wrapped.selected_alpn_protocol())
                except OSError:
                    pass

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield chosen
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def _free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago: Pebble cannot say which port it got."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _wait_for(port: int, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        else:
            return
