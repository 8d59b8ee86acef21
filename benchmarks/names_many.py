"""Measure a relay with many host names: `python -m benchmarks.names_many [COUNT]`.

It opens COUNT (10 000) tunnels of the webmux backend with a name each and prints the memory of the relay:

    one certificate    a wildcard for all names
    one each           COUNT certificates in the relay's folder; then a visitor of each name has one request answered in
                       TLS, by a page that says that no agent is connected
"""

from __future__ import annotations

import socket
import ssl
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.many import Control
from benchmarks.network import own_network
from benchmarks.processes import (
    LOOPBACK,
    POLL_INTERVAL,
    Address,
    BenchError,
    Child,
    Crew,
    descriptor_limit,
    free_port,
    orphans_ended,
    resident,
)
from tunneld.acme.state import certificate_folder
from tunneld.tls.folder import CertificateFolder
from tunneld.tls.self_signed import make_self_signed

DOMAIN = "t.example.org"
PATIENCE = 120.0
"""Seconds for the relay to start."""

CONFIG = """
[control]
port = {control}
idle_timeout = 3600.0
[http]
enabled = false
[webmux]
port = 0
[tunnels]
max_tunnels = {most}
open_timeout = 3600.0
pairing_timeout = 0.001
[names]
domain = "{domain}"
https = "127.0.0.1:{https}"
max_names_per_owner = {most}
[daemon]
state = "{state}"
[log]
level = "warning"
"""

WILDCARD = """
[[certificate]]
certificate = "{certificate}"
key = "{key}"
"""


@contextmanager
def relay(count: int, *, each: bool) -> Iterator[tuple[Control, int, Address]]:
    """Run a relay with one certificate, or one for each name; yields its control connection, its process and its port
    for TLS.
    """
    with Crew() as crew:
        control, https, state = free_port(), free_port(), crew.folder / "state"
        state.mkdir()
        text = CONFIG.format(control=control, https=https, most=count + 1000, state=state, domain=DOMAIN)
        if each:
            store(certificate_folder(state), count)
        else:
            made = make_self_signed(f"*.{DOMAIN}")
            certificate, key = (
                crew.file("site.crt", made.certificate.decode()),
                crew.file("site.key", made.key.decode()),
            )
            text += WILDCARD.format(certificate=certificate, key=key)
        child = crew.start("tunneld", [sys.executable, "-m", "tunneld", "--config", crew.file("tunnel.toml", text)])
        yield connected(child, control), child.process.pid, (LOOPBACK, https)


def connected(child: Child, port: int) -> Control:
    """The control connection, once the relay has read all certificates."""
    deadline = time.monotonic() + PATIENCE
    while child.process.poll() is None and time.monotonic() < deadline:
        with suppress(ConnectionRefusedError):
            return Control(port)
        time.sleep(POLL_INTERVAL)
    raise BenchError(f"tunneld did not start: {child.output.read_text()[-300:]}")


def store(folder: Path, count: int) -> None:
    """Put `count` certificates into a relay's folder."""
    print(f"making {count} certificates ...", flush=True)
    certificates, now = CertificateFolder(folder), datetime.now(UTC)
    certificates.read({})
    for number in range(count):
        made = make_self_signed(name(number), now)
        certificates.write(made.certificate, made.key)


def name(number: int) -> str:
    """A host name."""
    return f"n{number}.{DOMAIN}"


def open_names(control: Control, pid: int, count: int) -> None:
    """Open a tunnel for each name, and print the memory of the relay."""
    print(f"    started                       {resident([pid]) / 2**20:8.1f} MiB")
    for number in range(count):
        control.ask(f"openTunnel webmux persist=yes host=n{number}")
    print(f"    {count} names                   {resident([pid]) / 2**20:8.1f} MiB", flush=True)


def visit_all(address: Address, count: int) -> None:
    """Visit each name once."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    for number in range(count):
        host = name(number)
        with (
            socket.create_connection(address, timeout=30) as plain,
            context.wrap_socket(plain, server_hostname=host) as tls,
        ):
            tls.sendall(f"GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
            answer = tls.recv(4096)
        if not answer.startswith(b"HTTP/1.1 503"):
            raise SystemExit(f"{host}: unexpected answer: {answer[:60]!r}")


def main(count: int) -> None:
    """Measure both, one after the other."""
    descriptor_limit()
    own_network()
    with orphans_ended():
        print("one certificate")
        with relay(count, each=False) as (control, pid, address):
            open_names(control, pid, count)
            visit_all(address, count)
            print(f"    and a visit of each           {resident([pid]) / 2**20:8.1f} MiB")
        print("one certificate each")
        with relay(count, each=True) as (control, pid, address):
            open_names(control, pid, count)
            visit_all(address, count)
            print(f"    and a visit of each           {resident([pid]) / 2**20:8.1f} MiB")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000)
