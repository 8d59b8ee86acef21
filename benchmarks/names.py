"""`python -m benchmarks.names`: host names beside HAProxy and nginx as HTTP proxies, one hop, by the processor's time.

    clients ──► relay ──► agent ──► nginx          tunneld; only the relay's process is measured
    clients ──► proxy ──► nginx                    HAProxy (mode http), nginx (proxy_pass), each with one thread

A machine that does other work changes rates, but hardly the processor time of one process for one request. So the time
is what is compared (/proc/PID/schedstat: user and system, in nanoseconds), as a median over interleaved rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks import servers
from benchmarks.network import own_network
from benchmarks.processes import (
    LOOPBACK,
    Address,
    BenchError,
    Child,
    Crew,
    descriptor_limit,
    find,
    free_port,
    need,
    orphans_ended,
)
from benchmarks.topologies import COMPILED, TUNNEL, TUNNEL_TOML, TUNNELD
from tunneld.tls.self_signed import make_self_signed

HOST = "blog.t.example.org"
CONNECTIONS = 64
BULK = 256 << 20
"""Bytes of the large file."""
HANDSHAKES = 200
IDLE = 1000

CONFIG = (
    TUNNEL_TOML
    + """
[names]
domain = "t.example.org"
http = "127.0.0.1:{http}"
https = "127.0.0.1:{https}"
[[certificate]]
certificate = "{certificate}"
key = "{key}"
"""
)

HAPROXY = """
global
    nbthread 1
    maxconn 8000
defaults
    mode http
    option forwardfor
    http-reuse safe
    timeout connect 10s
    timeout client 10m
    timeout server 10m
frontend hop
    bind 127.0.0.1:{http}
    bind 127.0.0.1:{https} ssl crt {pem}
    default_backend origin
backend origin
    server origin {server[0]}:{server[1]}
"""

PROXY = """
http {{
    access_log off;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    keepalive_requests 1000000000;
    proxy_buffering off;
    upstream origin {{ server {server[0]}:{server[1]}; keepalive 512; keepalive_requests 1000000000; }}
    server {{
        listen 127.0.0.1:{http} backlog=4096;
        listen 127.0.0.1:{https} ssl backlog=4096;
        ssl_certificate {certificate}; ssl_certificate_key {key};
        location / {{
            proxy_pass http://origin;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Host $host;
            proxy_set_header X-Forwarded-For $remote_addr;
        }}
    }}
}}
"""


@dataclass(frozen=True, slots=True)
class Hop:
    """A running proxy: its process, its ports, and the port of the same tunnel without HTTP."""

    child: Child
    http: Address
    https: Address
    port: Address | None = None

    def seconds(self) -> float:
        """Processor time of its processes so far."""
        total = 0
        for pid in self.child.tree():
            for task in Path(f"/proc/{pid}/task").iterdir():
                total += int((task / "schedstat").read_text().split()[0])
        return total / 1e9

    def resident(self) -> int:
        """Its resident memory in bytes."""
        found = re.search(
            r"^Rss:\s+(\d+)", Path(f"/proc/{self.child.process.pid}/smaps_rollup").read_text(), re.MULTILINE
        )
        assert found is not None
        return int(found[1]) * 1024


@dataclass(frozen=True, slots=True)
class Measurement:
    """One row: what is done, and the unit of the result."""

    name: str
    title: str
    unit: str
    sample: Callable[[Hop, float], float | None]


# The columns


def ours(backend: str, python: str = sys.executable) -> Callable[[Crew, Address], Hop]:
    """`tunneld` with a tunnel that has a host name, and another with a port, to the same server."""

    def build(crew: Crew, server: Address) -> Hop:
        made = make_self_signed(HOST)
        http, https = free_port(), free_port()
        text = CONFIG.format(
            http=http,
            https=https,
            certificate=crew.file("site.pem", made.certificate.decode()),
            key=crew.file("site.key", made.key.decode()),
        )
        config = crew.file("tunnel.toml", text)
        daemon = crew.start("tunneld", [python, "-P", "-c", TUNNELD, "--config", config, "--log-format", "json"])
        control = daemon.line(_control_uri)
        command = ["expose", f"{server[0]}:{server[1]}", "--relay", control, "--backend", backend, "--quiet"]
        options = ["--host", "blog", "--plain-http", "allow"]
        named = crew.start("tunnel", [python, "-P", "-c", TUNNEL, *command, *options])
        named.line(lambda line: line if HOST in line else None)
        agent = crew.start("tunnel with a port", [python, "-P", "-c", TUNNEL, *command])
        public = agent.line(lambda line: line.strip() if line.startswith("tcp://") else None)
        host, _, port = public.removeprefix("tcp://").rpartition(":")
        return Hop(daemon, (LOOPBACK, http), (LOOPBACK, https), (host, int(port)))

    return build


def _control_uri(line: str) -> str | None:
    fields = json.loads(line)
    return fields["uri"] if fields["event"] == "control listens" else None


def haproxy(crew: Crew, server: Address) -> Hop:
    """Run HAProxy in HTTP mode, with one thread."""
    made = make_self_signed(HOST)
    pem = crew.file("site.pem", (made.certificate + made.key).decode())
    http, https = free_port(), free_port()
    config = crew.file("haproxy.cfg", HAPROXY.format(http=http, https=https, pem=pem, server=server))
    child = crew.start("haproxy", [need("haproxy"), "-db", "-q", "-f", config])
    return Hop(child, child.listening(http), (LOOPBACK, https))


def nginx(crew: Crew, server: Address) -> Hop:
    """Run nginx as an HTTP proxy that keeps connections to the server, one worker."""
    made = make_self_signed(HOST)
    http, https = free_port(), free_port()
    text = servers.nginx_basics(crew.folder, descriptor_limit()) + PROXY.format(
        folder=crew.folder,
        http=http,
        https=https,
        server=server,
        certificate=crew.file("site.pem", made.certificate.decode()),
        key=crew.file("site.key", made.key.decode()),
    )
    child = crew.start("nginx", servers.nginx_command(crew.file("proxy.conf", text)))
    return Hop(child, child.listening(http), (LOOPBACK, https))


COLUMNS: dict[str, tuple[tuple[str, ...], Callable[[Crew, Address], Hop]]] = {
    "tcp": ((), ours("tcp")),
    "webmux": ((), ours("webmux")),
    "tcp-compiled": ((COMPILED,), ours("tcp", COMPILED)),
    "webmux-compiled": ((COMPILED,), ours("webmux", COMPILED)),
    "haproxy": (("haproxy",), haproxy),
    "nginx": (("nginx",), nginx),
}


# The rows


def _wrk(address: Address, seconds: float, *fields: str) -> int:
    """Run `wrk`; return the number of requests."""
    options = ["--threads", "1", "--connections", str(CONNECTIONS), "--duration", f"{max(1, round(seconds))}"]
    headers = [part for field in (f"Host: {HOST}", *fields) for part in ("--header", field)]
    done = subprocess.run(
        [need("wrk"), *options, *headers, f"http://{address[0]}:{address[1]}/"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
        timeout=seconds + 30,
    )
    found = re.search(r"(\d+) requests in", done.stdout)
    failed = re.search(r"Non-2xx or 3xx responses: (\d+)", done.stdout)
    if found is None or not int(found[1]) or failed:
        raise BenchError(f"wrk got no answers: {done.stdout.strip().splitlines()[-1:]}")
    return int(found[1])


def small(hop: Hop, seconds: float) -> float:
    """Processor time of a small request, 64 keep-alive connections, in µs."""
    before = hop.seconds()
    count = _wrk(hop.http, seconds)
    return (hop.seconds() - before) / count * 1e6


def small_by_port(hop: Hop, seconds: float) -> float | None:
    """The same through a port of the same relay, which does not look at HTTP."""
    if hop.port is None:
        return None
    before = hop.seconds()
    count = _wrk(hop.port, seconds)
    return (hop.seconds() - before) / count * 1e6


def fresh(hop: Hop, seconds: float) -> float:
    """Processor time of a connection with one request, in µs."""
    before = hop.seconds()
    count = _wrk(hop.http, seconds, "Connection: close")
    return (hop.seconds() - before) / count * 1e6


def handshake(hop: Hop, _seconds: float) -> float:
    """Processor time of a connection in TLS with one request, in µs. No session is resumed."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    before = hop.seconds()
    for _ in range(HANDSHAKES):
        with (
            socket.create_connection(hop.https, timeout=10) as plain,
            context.wrap_socket(plain, server_hostname=HOST) as tls,
        ):
            tls.sendall(f"GET / HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n\r\n".encode())
            answer = b""
            while chunk := tls.recv(65536):
                answer += chunk
            if not answer.startswith(b"HTTP/1.1 200"):
                raise BenchError(f"unexpected answer: {answer[:80]!r}")
    return (hop.seconds() - before) / HANDSHAKES * 1e6


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


ROWS = (
    Measurement("small", f"small request, {CONNECTIONS} connections", "µs", small),
    Measurement("port", "  the same by a port", "µs", small_by_port),
    Measurement("fresh", "new connection with one request", "µs", fresh),
    Measurement("tls", "new connection in TLS with one request", "µs", handshake),
    Measurement("bulk", "download", "ms/GB", bulk),
    Measurement("bulk-port", "  the same by a port", "ms/GB", bulk_by_port),
    Measurement("idle", "idle connection (RSS)", "KiB", idle),
)


@contextmanager
def origin() -> Iterator[Address]:
    """Run nginx with a small and a large file."""
    with Crew() as crew:
        (crew.folder / "pages").mkdir()
        crew.file("pages/index.html", servers.PAGE)
        with (crew.folder / "pages/large").open("wb") as file:
            file.truncate(BULK)
        port = free_port()
        text = servers.nginx_basics(crew.folder, descriptor_limit())
        text += servers.HTTP.format(folder=crew.folder, host=LOOPBACK, port=port)
        child = crew.start("nginx (http)", servers.nginx_command(crew.file("nginx.conf", text)))
        yield child.listening(port)


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
                    except (BenchError, OSError) as error:
                        print(f"{name}, {row.name}: {error}", file=sys.stderr)
                        continue
                    if value is not None:
                        samples.setdefault((row.name, name), []).append(value)
    print(" | ".join(["processor time", *columns]))
    for row in rows:
        cells = [_cell(samples.get((row.name, name))) for name in columns]
        print(" | ".join([f"{row.title}, {row.unit}", *cells]))
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
    with orphans_ended():
        measure(columns, rows, arguments.seconds, arguments.rounds)


if __name__ == "__main__":
    main()
