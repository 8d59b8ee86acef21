"""What `benchmarks.names` compares: tunneld with a host name, and HTTP proxies and tunnels of others.

Each runs on one processor at most (`nbthread 1`, one worker, GOMAXPROCS=1), with a certificate for `HOST`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks import servers
from benchmarks.processes import LOOPBACK, Address, Child, Crew, descriptor_limit, free_port, need
from benchmarks.topologies import COMPILED, TLS_TOML, TUNNEL, TUNNEL_TOML, TUNNELD
from tunneld.tls.self_signed import make_self_signed

HOST = "blog.t.example.org"
PASSED = "passed.t.example.org"
"""Its TLS ends at the hidden server."""

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
    proxy_request_buffering off;
    client_max_body_size 0;
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


CADDY = """
{{
    admin off
    auto_https off
    skip_install_trust
    http_port {http}
    https_port {https}
    log {{
        level ERROR
    }}
}}
(site) {{
    bind 127.0.0.1
    reverse_proxy {server[0]}:{server[1]} {{
        transport http {{
            keepalive_idle_conns_per_host 512
        }}
    }}
}}
http://{host}:{http} {{
    import site
}}
https://{host}:{https} {{
    import site
    tls {certificate} {key}
}}
"""

FRPS = """
bindAddr = "127.0.0.1"
bindPort = {control}
vhostHTTPPort = {http}
vhostHTTPSPort = {https}
log.level = "error"
"""

FRPC = """
serverAddr = "127.0.0.1"
serverPort = {control}
log.level = "error"
transport.poolCount = 5
[[proxies]]
name = "http"
type = "http"
localIP = "{server[0]}"
localPort = {server[1]}
customDomains = ["{host}"]
[[proxies]]
name = "https"
type = "https"
customDomains = ["{host}"]
[proxies.plugin]
type = "https2http"
localAddr = "{server[0]}:{server[1]}"
crtPath = "{certificate}"
keyPath = "{key}"
"""

GO = ["env", "GOMAXPROCS=1"]


@dataclass(frozen=True, slots=True)
class Origin:
    """The hidden server: nginx, with and without TLS."""

    http: Address
    https: Address


@dataclass(frozen=True, slots=True)
class Hop:
    """A running proxy or relay, and what is reached through it."""

    child: Child
    http: Address
    https: Address
    agent: Child | None = None
    port: Address | None = None  # to the server without a name
    tls_port: Address | None = None  # to its TLS without a name
    passes: bool = False  # connections for `PASSED` go to the server's TLS

    def seconds(self) -> float:
        """Processor time of the relay's or proxy's processes so far."""
        return _seconds(self.child)

    def both_seconds(self) -> float:
        """The same with the agent's."""
        return _seconds(self.child) + (_seconds(self.agent) if self.agent is not None else 0)

    def resident(self) -> int:
        """Its resident memory in bytes."""
        return resident(self.child.process.pid)


def _seconds(child: Child) -> float:
    total = 0
    for pid in child.tree():
        for task in Path(f"/proc/{pid}/task").iterdir():
            total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9


def resident(pid: int) -> int:
    """Resident memory of a process in bytes."""
    found = re.search(r"^Rss:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def certificate(crew: Crew, name: str) -> dict[str, Path]:
    """Make files with a certificate for this name, and its key."""
    made = make_self_signed(name)
    pem, key = made.certificate.decode(), made.key.decode()
    return {
        "certificate": crew.file("site.crt", pem),
        "key": crew.file("site.key", key),
        "pem": crew.file("site.pem", pem + key),
    }


def ours(backend: str, python: str = sys.executable, *, tls: bool = False) -> Callable[[Crew, Origin], Hop]:
    """`tunneld` with tunnels that have host names, and others with ports, to the same servers. With `tls` the agent
    connects in TLS.
    """

    def build(crew: Crew, origin: Origin) -> Hop:
        http, https = free_port(), free_port()
        text = CONFIG.format(http=http, https=https, **certificate(crew, HOST))
        trust = []
        if tls:
            made = make_self_signed(LOOPBACK)
            relay_files = crew.file("relay.pem", made.certificate.decode()), crew.file("relay.key", made.key.decode())
            text += TLS_TOML.format(certificate=relay_files[0], key=relay_files[1])
            trust = ["--pin", made.pin]
        config = crew.file("tunnel.toml", text)
        daemon = crew.start("tunneld", [python, "-P", "-c", TUNNELD, "--config", config, "--log-format", "json"])
        relay = ["--relay", daemon.line(_control_uri), *trust, "--backend", backend, "--quiet"]

        def expose(server: Address, *options: str) -> Child:
            command = [python, "-P", "-c", TUNNEL, "expose", f"{server[0]}:{server[1]}", *relay, *options]
            return crew.start("tunnel", command)

        def public(agent: Child) -> Address:
            address = agent.line(lambda line: line.strip() if line.startswith("tcp://") else None)
            host, _, port = address.removeprefix("tcp://").rpartition(":")
            return host, int(port)

        named = expose(origin.http, "--host", "blog", "--plain-http", "allow")
        named.line(lambda line: line if HOST in line else None)
        passed = expose(origin.https, "--host", "passed", "--tls", "pass")
        passed.line(lambda line: line if PASSED in line else None)
        by_port, by_tls_port = public(expose(origin.http)), public(expose(origin.https))
        return Hop(daemon, (LOOPBACK, http), (LOOPBACK, https), named, by_port, by_tls_port, passes=True)

    return build


def _control_uri(line: str) -> str | None:
    fields = json.loads(line)
    return fields["uri"] if fields["event"] == "control listens" else None


def haproxy(crew: Crew, origin: Origin) -> Hop:
    """Run HAProxy in HTTP mode, with one thread."""
    http, https = free_port(), free_port()
    files = certificate(crew, HOST)
    config = crew.file("haproxy.cfg", HAPROXY.format(http=http, https=https, server=origin.http, **files))
    child = crew.start("haproxy", [need("haproxy"), "-db", "-q", "-f", config])
    return Hop(child, child.listening(http), (LOOPBACK, https))


def nginx(crew: Crew, origin: Origin) -> Hop:
    """Run nginx as an HTTP proxy that keeps connections to the server, one worker."""
    http, https = free_port(), free_port()
    files = certificate(crew, HOST)
    text = servers.nginx_basics(crew.folder, descriptor_limit())
    text += PROXY.format(folder=crew.folder, http=http, https=https, server=origin.http, **files)
    child = crew.start("nginx", servers.nginx_command(crew.file("proxy.conf", text)))
    return Hop(child, child.listening(http), (LOOPBACK, https))


def caddy(crew: Crew, origin: Origin) -> Hop:
    """Run Caddy as a reverse proxy."""
    http, https = free_port(), free_port()
    files = certificate(crew, HOST)
    config = crew.file("Caddyfile", CADDY.format(host=HOST, http=http, https=https, server=origin.http, **files))
    home = [f"XDG_DATA_HOME={crew.folder}", f"XDG_CONFIG_HOME={crew.folder}", f"HOME={crew.folder}"]
    command: list[str | Path] = [*GO, *home, need("caddy"), "run", "--adapter", "caddyfile", "--config", config]
    child = crew.start("caddy", command)
    return Hop(child, child.listening(http), child.listening(https))


def frp(crew: Crew, origin: Origin) -> Hop:
    """Run frps with virtual hosts, and frpc. Its TLS towards visitors ends at frpc: frps has none for HTTP."""
    control, http, https = free_port(), free_port(), free_port()
    files = certificate(crew, HOST)
    relay = crew.file("frps.toml", FRPS.format(control=control, http=http, https=https))
    child = crew.start("frps", [*GO, need("frps"), "-c", relay])
    child.listening(control)
    agent = crew.file("frpc.toml", FRPC.format(control=control, host=HOST, server=origin.http, **files))
    hidden = crew.start("frpc", [*GO, need("frpc"), "-c", agent])
    return Hop(child, child.listening(http), child.listening(https), hidden)


def sish(crew: Crew, origin: Origin) -> Hop:
    """Run sish, with OpenSSH as its agent."""
    control, http, https = free_port(), free_port(), free_port()
    made = make_self_signed(HOST)
    keys = crew.folder / "ssl"
    keys.mkdir()
    crew.file(f"ssl/{HOST}.crt", made.certificate.decode())
    crew.file(f"ssl/{HOST}.key", made.key.decode())
    options = {
        "ssh-address": f"127.0.0.1:{control}",
        "http-address": f"127.0.0.1:{http}",
        "https-address": f"127.0.0.1:{https}",
        "https": "true",
        "https-certificate-directory": keys,
        "private-keys-directory": crew.folder,
        "authentication-keys-directory": keys,
        "domain": HOST.partition(".")[2],
        "authentication": "false",
        "bind-random-subdomains": "false",
        "load-templates": "false",
        "log-to-stdout": "false",
        "verify-dns": "false",
        "idle-connection": "false",
    }
    words = [f"--{name}={value}" for name, value in options.items()]
    child = crew.start("sish", [*GO, need("sish"), *words])
    child.listening(control)
    forward = ["-R", f"{HOST.partition('.')[0]}:80:{origin.http[0]}:{origin.http[1]}", "127.0.0.1"]
    trust = ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]
    agent = crew.start("ssh", [need("ssh"), "-F", "none", "-p", str(control), *trust, *forward])
    agent.line(lambda line: line if HOST in line else None)
    return Hop(child, (LOOPBACK, http), (LOOPBACK, https), agent)


COLUMNS: dict[str, tuple[tuple[str, ...], Callable[[Crew, Origin], Hop]]] = {
    "tcp": ((), ours("tcp")),
    "webmux": ((), ours("webmux")),
    "webmux-tls": ((), ours("webmux", tls=True)),
    "tcp-compiled": ((COMPILED,), ours("tcp", COMPILED)),
    "webmux-compiled": ((COMPILED,), ours("webmux", COMPILED)),
    "webmux-tls-compiled": ((COMPILED,), ours("webmux", COMPILED, tls=True)),
    "haproxy": (("haproxy",), haproxy),
    "nginx": (("nginx",), nginx),
    "caddy": (("caddy",), caddy),
    "frp": (("frps", "frpc"), frp),
    "sish": (("sish", "ssh"), sish),
}
