"""`python -m benchmarks.names`: host names beside HTTP proxies and other tunnels, by the processor's time.

    clients ──► relay ──► agent ──► nginx          tunneld, frp (vhost), sish; only the relay's process is measured
    clients ──► proxy ──► nginx                    HAProxy (mode http), nginx (proxy_pass), Caddy

A machine that does other work changes rates, but hardly the processor time of one process for one request. So the time
is what is compared (/proc/PID/schedstat: user and system, in nanoseconds), as a median over interleaved rounds. The
rows of two hops count the agent's process, too, and have rates. Programs that are not on PATH are left out.
"""

from __future__ import annotations

import argparse
import os
import re
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

from benchmarks import servers
from benchmarks.network import own_hosts, own_network
from benchmarks.processes import (
    LOOPBACK,
    Address,
    BenchError,
    Crew,
    descriptor_limit,
    find,
    free_port,
    need,
    orphans_ended,
)
from benchmarks.proxies import COLUMNS, HOST, PASSED, Hop, Origin, certificate

CONNECTIONS = 64
BULK = 256 << 20
"""Bytes of the large file."""
HANDSHAKES = 400
TOGETHER = 8
"""Handshakes at a time: one after the other, a relay mostly waits, and its waiting is counted."""
IDLE = 1000

TLS_SERVER = """
    server {{
        listen {host}:{port} ssl backlog=4096;
        ssl_certificate {certificate}; ssl_certificate_key {key};
        root {folder}/pages;
    }}
}}
"""


@dataclass(frozen=True, slots=True)
class Measurement:
    """One row: what is done, and the unit of the result."""

    name: str
    title: str
    unit: str
    sample: Callable[[Hop, float], float | None]


def _wrk(address: Address, seconds: float, *fields: str, scheme: str = "http") -> tuple[int, float]:
    """Run `wrk`; return the number of requests, and how many that were a second."""
    options = ["--threads", "1", "--connections", str(CONNECTIONS), "--duration", f"{max(1, round(seconds))}"]
    headers = [part for field in (f"Host: {HOST}", *fields) for part in ("--header", field)]
    host = HOST if scheme == "https" else address[0]  # it is the server name of the handshake, see `own_hosts`
    done = subprocess.run(
        [need("wrk"), *options, *headers, f"{scheme}://{host}:{address[1]}/"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=seconds + 30,
    )
    found = re.search(r"(\d+) requests in", done.stdout)
    rate = re.search(r"Requests/sec:\s+([\d.]+)", done.stdout)
    failed = re.search(r"Non-2xx or 3xx responses: (\d+)", done.stdout)
    if found is None or rate is None or not int(found[1]) or failed:
        raise BenchError(f"wrk got no answers: {(done.stdout + done.stderr).strip().splitlines()[-1:]}")
    return int(found[1]), float(rate[1])


def requests(*fields: str, scheme: str = "http") -> Callable[[Hop, float], float]:
    """Processor time of the relay for a request, in µs; by HTTP or HTTPS, with these fields."""

    def sample(hop: Hop, seconds: float) -> float:
        before = hop.seconds()
        count, _ = _wrk(hop.http if scheme == "http" else hop.https, seconds, *fields, scheme=scheme)
        return (hop.seconds() - before) / count * 1e6

    return sample


def requests_by_port(*fields: str) -> Callable[[Hop, float], float | None]:
    """The same through a port of the same relay, which does not look at HTTP."""

    def sample(hop: Hop, seconds: float) -> float | None:
        if hop.port is None:
            return None
        before = hop.seconds()
        count, _ = _wrk(hop.port, seconds, *fields)
        return (hop.seconds() - before) / count * 1e6

    return sample


def both_hops(hop: Hop, seconds: float) -> float | None:
    """Processor time of relay and agent for a request by HTTPS, in µs."""
    if hop.agent is None:
        return None
    before = hop.both_seconds()
    count, _ = _wrk(hop.https, seconds, scheme="https")
    return (hop.both_seconds() - before) / count * 1e6


def rate(hop: Hop, seconds: float) -> float | None:
    """Requests a second by HTTPS, over both hops."""
    return _wrk(hop.https, seconds, scheme="https")[1] if hop.agent is not None else None


def _visit(address: Address, name: str, context: ssl.SSLContext, session: ssl.SSLSession | None) -> ssl.SSLSession:
    """One connection in TLS with one request; returns its session."""
    with (
        socket.create_connection(address, timeout=20) as plain,
        context.wrap_socket(plain, server_hostname=name, session=session) as tls,
    ):
        tls.sendall(f"GET / HTTP/1.1\r\nHost: {name}\r\nConnection: close\r\n\r\n".encode())
        answer = b""
        while chunk := tls.recv(65536):
            answer += chunk
        if not answer.startswith(b"HTTP/1.1 200"):
            raise BenchError(f"unexpected answer: {answer[:80]!r}")
        if session is not None and not tls.session_reused:
            raise BenchError("the session was not resumed")
        assert tls.session is not None
        return tls.session


def _handshakes(hop: Hop, address: Address, name: str, *, again: bool = False) -> float:
    """Processor time of a connection in TLS with one request, in µs; `again`: its session is resumed."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    session = _visit(address, name, context, None) if again else None
    with ThreadPoolExecutor(TOGETHER) as threads:
        before = hop.seconds()
        for _ in threads.map(lambda _: _visit(address, name, context, session), range(HANDSHAKES)):
            pass
        return (hop.seconds() - before) / HANDSHAKES * 1e6


def handshake(hop: Hop, _seconds: float) -> float:
    """A full handshake."""
    return _handshakes(hop, hop.https, HOST)


def resumed(hop: Hop, _seconds: float) -> float:
    """A session is resumed."""
    return _handshakes(hop, hop.https, HOST, again=True)


def passed(hop: Hop, _seconds: float) -> float | None:
    """TLS that ends at the hidden server, found by its name."""
    return _handshakes(hop, hop.https, PASSED) if hop.passes else None


def passed_by_port(hop: Hop, _seconds: float) -> float | None:
    """The same through a port."""
    return _handshakes(hop, hop.tls_port, PASSED) if hop.tls_port is not None else None


def _download_tls(hop: Hop, address: Address) -> float:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with (
        socket.create_connection(address, timeout=30) as plain,
        context.wrap_socket(plain, server_hostname=PASSED) as client,
    ):
        before = hop.seconds()
        client.sendall(f"GET /large HTTP/1.1\r\nHost: {PASSED}\r\nConnection: close\r\n\r\n".encode())
        size, buffer = 0, bytearray(1 << 20)
        while count := client.recv_into(buffer):
            size += count
    return (hop.seconds() - before) / size * 1e12


def passed_bulk(hop: Hop, _seconds: float) -> float | None:
    """Processor time of a download in TLS that ends at the hidden server, in ms for each GB."""
    return _download_tls(hop, hop.https) if hop.passes else None


def passed_bulk_by_port(hop: Hop, _seconds: float) -> float | None:
    """The same through a port."""
    return _download_tls(hop, hop.tls_port) if hop.tls_port is not None else None


def _download(hop: Hop, address: Address | None) -> float | None:
    if address is None:
        return None
    buffer = bytearray(1 << 20)
    with socket.create_connection(address, timeout=30) as client:
        before = hop.seconds()
        client.sendall(f"GET /large HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n\r\n".encode())
        size = 0
        while count := client.recv_into(buffer, len(buffer), socket.MSG_TRUNC):
            size += count
    if size < BULK:
        raise BenchError("the download ended early")
    return (hop.seconds() - before) / size * 1e12  # s/B: ms/GB


def bulk(hop: Hop, _seconds: float) -> float | None:
    """Processor time of a download by its name, in ms for each GB."""
    return _download(hop, hop.http)


def bulk_by_port(hop: Hop, _seconds: float) -> float | None:
    """The same through a port."""
    return _download(hop, hop.port)


def _upload(hop: Hop, address: Address | None) -> float | None:
    if address is None:
        return None
    zeros = memoryview(bytes(1 << 20))
    with socket.create_connection(address, timeout=60) as client:
        before = hop.seconds()
        head = f"PUT /put HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: {BULK}\r\nConnection: close\r\n\r\n"
        client.sendall(head.encode())
        for _ in range(BULK // len(zeros)):
            client.sendall(zeros)
        answer = client.recv(65536)
    if not answer.startswith((b"HTTP/1.1 201", b"HTTP/1.1 204")):
        raise BenchError(f"unexpected answer: {answer[:80]!r}")
    return (hop.seconds() - before) / BULK * 1e12


def upload(hop: Hop, _seconds: float) -> float | None:
    """Processor time of an upload of known length by its name, in ms for each GB."""
    return _upload(hop, hop.http)


def upload_by_port(hop: Hop, _seconds: float) -> float | None:
    """The same through a port."""
    return _upload(hop, hop.port)


def idle(hop: Hop, _seconds: float) -> float:
    """Memory of a connection that has had one answer and is kept, in KiB."""
    before = 0
    visitors = []
    try:
        for number in range(IDLE + 100):
            if number == 100:
                before = hop.resident()
            visitor = socket.create_connection(hop.http, timeout=10)
            visitors.append(visitor)
            visitor.sendall(f"GET / HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode())
            if not visitor.recv(4096):
                raise BenchError("a visitor was refused")
        time.sleep(0.5)
        return (hop.resident() - before) / IDLE / 1024
    finally:
        for visitor in visitors:
            visitor.close()


CLOSE = "Connection: close"
ROWS = (
    Measurement("small", f"small request, {CONNECTIONS} connections", "µs", requests()),
    Measurement("port", "  the same by a port", "µs", requests_by_port()),
    Measurement("fresh", "new connection with one request", "µs", requests(CLOSE)),
    Measurement("fresh-port", "  the same by a port", "µs", requests_by_port(CLOSE)),
    Measurement("https", f"small request in TLS, {CONNECTIONS} connections", "µs", requests(scheme="https")),
    Measurement("both", "  with the agent", "µs", both_hops),
    Measurement("rate", "  requests a second", "", rate),
    Measurement("tls", "new connection in TLS with one request", "µs", handshake),
    Measurement("again", "  its session is resumed", "µs", resumed),
    Measurement("pass", "new connection, TLS at the server", "µs", passed),
    Measurement("pass-port", "  the same by a port", "µs", passed_by_port),
    Measurement("bulk", "download", "ms/GB", bulk),
    Measurement("bulk-port", "  the same by a port", "ms/GB", bulk_by_port),
    Measurement("upload", "upload", "ms/GB", upload),
    Measurement("upload-port", "  the same by a port", "ms/GB", upload_by_port),
    Measurement("pass-bulk", "download, TLS at the server", "ms/GB", passed_bulk),
    Measurement("pass-bulk-port", "  the same by a port", "ms/GB", passed_bulk_by_port),
    Measurement("idle", "idle connection (RSS)", "KiB", idle),
)


@contextmanager
def origin() -> Iterator[Origin]:
    """Run nginx with a small and a large file, with and without TLS."""
    with Crew() as crew:
        (crew.folder / "pages").mkdir()
        crew.file("pages/index.html", servers.PAGE)
        with (crew.folder / "pages/large").open("wb") as file:
            file.truncate(BULK)
        port, tls = free_port(), free_port()
        text = servers.nginx_basics(crew.folder, descriptor_limit())
        text += servers.HTTP.format(folder=crew.folder, host=LOOPBACK, port=port).rstrip().removesuffix("}")
        text += "dav_methods PUT; client_max_body_size 0;"
        text += TLS_SERVER.format(folder=crew.folder, host=LOOPBACK, port=tls, **certificate(crew, PASSED))
        child = crew.start("nginx (http)", servers.nginx_command(crew.file("nginx.conf", text)))
        yield Origin(child.listening(port), (LOOPBACK, tls))


def measure(columns: Sequence[str], rows: Sequence[Measurement], seconds: float, rounds: int) -> None:
    """Run all columns at the same time, measured in turns, and print the table."""
    samples: dict[tuple[str, str], list[float]] = {}
    with Crew() as crew, origin() as server:
        hops = {}
        for name in columns:
            own = Crew()
            crew.share(own)
            hops[name] = COLUMNS[name][1](own, server)
        for number in range(rounds):
            for row in rows:
                for name, hop in hops.items():
                    if row.name == "idle" and number:
                        continue
                    if row.name == "small" and not number:
                        row.sample(hop, 1)  # warm up
                    try:
                        value = row.sample(hop, seconds)
                    except (BenchError, OSError, subprocess.SubprocessError) as error:
                        print(f"{name}, {row.name}: {error}", file=sys.stderr)
                        continue
                    if value is not None:
                        samples.setdefault((row.name, name), []).append(value)
    print(" | ".join(["processor time", *columns]))
    for row in rows:
        cells = [_cell(samples.get((row.name, name))) for name in columns]
        print(" | ".join([f"{row.title}, {row.unit}" if row.unit else row.title, *cells]))
    print("load average", *os.getloadavg())


def _cell(values: list[float] | None) -> str:
    if not values:
        return "–"
    middle = median(values)
    spread = max(abs(value - middle) for value in values) / middle * 100 if middle else 0
    return f"{middle:.1f} ±{spread:.0f}%"


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.names", description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", choices=[*COLUMNS, *(row.name for row in ROWS)], default=[])
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    only = set(arguments.only)
    columns = [name for name, (programs, _) in COLUMNS.items() if all(map(find, programs))]
    columns = [name for name in columns if not only & set(COLUMNS) or name in only]
    rows = [row for row in ROWS if not only - set(COLUMNS) or row.name in only]
    own_network()
    own_hosts(f"{LOOPBACK} {HOST} localhost\n")
    with orphans_ended():
        measure(columns, rows, arguments.seconds, arguments.rounds)


if __name__ == "__main__":
    main()
