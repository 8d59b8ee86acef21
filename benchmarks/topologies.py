"""What is compared: ways for a client to reach a server over two hops, client -> relay -> agent -> server.

Each is opened with the address of a server, and yields the address for clients and the process of the relay.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from urllib.parse import SplitResult, urlsplit

from benchmarks import peers, ssh
from benchmarks.processes import LOOPBACK, Address, Child, Crew, descriptor_limit, find, free_port, need
from benchmarks.servers import nginx_basics, nginx_command
from benchmarks.versions import nginx_module
from tunneld.tls.identity import Identity
from tunneld.tls.self_signed import make_self_signed


@dataclass(frozen=True, slots=True)
class Reach:
    """The address for clients, the relay process that listens there, if any, and the processes of both hops."""

    address: Address
    relay: Child | None = None
    hops: tuple[Child, ...] = ()


@dataclass(frozen=True, slots=True)
class Topology:
    """One column of the table."""

    name: str
    title: str
    programs: tuple[str, ...]
    build: Callable[[Crew, Address], Reach]
    idle: bool = True
    """Whether the cost of idle connections can be measured: there is a relay, and it does not fork for each."""

    def missing(self) -> list[str]:
        """Return the required programs that are not installed."""
        return [program for program in self.programs if find(program) is None]

    @contextmanager
    def open(self, server: Address) -> Iterator[Reach]:
        """Run the topology in front of a server. Raises `BenchError` or `OSError`."""
        with Crew() as crew:
            reach = self.build(crew, server)
            yield replace(reach, hops=tuple(crew.children))


def direct(_: Crew, server: Address) -> Reach:
    """No relay: the limits of the server, the client and the machine."""
    return Reach(server)


# tunneld

TUNNELD = "import sys; from tunneld.cli.tunneld import main; sys.exit(main())"
TUNNEL = "import sys; from tunneld.cli.tunnel import main; sys.exit(main())"
"""The code of the installed commands."""

TUNNEL_TOML = """
[control]
port = 0
[http]
port = 0
[tunnels]
ports = "0"
[webmux]
port = 0
[egtp]
enabled = true
port = 0
[daemon]
state = "state"
"""

TLS_TOML = """
[control.tls]
certificate = "{certificate}"
key = "{key}"
"""


COMPILED = ".compiled/bin/python"
"""The Python with the compiled build, which the Makefile makes."""


def ours(backend: str, *, tls: bool = False, python: str = sys.executable) -> Callable[[Crew, Address], Reach]:
    """`tunneld` and `tunnel expose` with their defaults, except for free ports.

    `--quiet` is used since most peers do not write a line for each visitor either. `-P` makes Python import the
    installed package, not the one in the current folder.
    """

    def build(crew: Crew, server: Address) -> Reach:
        daemon, relay = _relay(crew, tls=tls, python=python)
        command = ["expose", f"{server[0]}:{server[1]}", *relay, "--backend", backend, "--quiet"]
        agent = crew.start("tunnel", [python, "-P", "-c", TUNNEL, *command])
        public = agent.line(lambda line: urlsplit(line.strip()) if line.startswith("tcp://") else None)
        return Reach((public.hostname or "", public.port or 0), daemon)

    return build


def ours_private(backend: str, *, python: str = sys.executable) -> Callable[[Crew, Address], Reach]:
    """The same with TLS, and a private tunnel: a third process of ours, `tunnel visit`, is beside the client."""

    def build(crew: Crew, server: Address) -> Reach:
        daemon, relay = _relay(crew, tls=True, python=python)
        host, visitor = Identity.create(), Identity.create()
        host.save(crew.folder / "host.pem")
        visitor.save(crew.folder / "visitor.pem")
        keys = [f"{crew.folder}/{name}.pem" for name in ("host", "visitor")]
        private = ["--private", "--name", "bench", "--admit", str(visitor.id), "--identity", keys[0]]
        private += ["--backend", backend]
        command = ["expose", f"{server[0]}:{server[1]}", *relay, *private, "--quiet"]
        agent = crew.start("tunnel", [python, "-P", "-c", TUNNEL, *command])
        agent.line(lambda line: line if line.startswith("private://") else None)
        command = ["visit", f"bench@{host.id}", *relay, "--identity", keys[1], "--quiet"]
        visit = crew.start("tunnel visit", [python, "-P", "-c", TUNNEL, *command])
        local = visit.line(lambda line: urlsplit(f"tcp://{line.strip()}") if line.startswith(LOOPBACK) else None)
        return Reach((local.hostname or "", local.port or 0), daemon)

    return build


def _relay(crew: Crew, *, tls: bool, python: str) -> tuple[Child, list[str]]:
    """Start `tunneld`; returns it, and the options by which `tunnel` reaches it."""
    text, trust = TUNNEL_TOML, []
    if tls:
        made = make_self_signed(LOOPBACK)
        text += TLS_TOML.format(
            certificate=crew.file("relay.pem", made.certificate.decode()),
            key=crew.file("relay.key", made.key.decode()),
        )
        trust = ["--pin", made.pin]
    config = crew.file("tunnel.toml", text)
    daemon = crew.start("tunneld", [python, "-P", "-c", TUNNELD, "--config", config, "--log-format", "json"])
    control = daemon.line(_control_uri)
    return daemon, ["--relay", f"{control.scheme}://{control.hostname}:{control.port}", *trust]


SSH_TOML = """
[ssh]
enabled = true
port = 0
max_channels = 4000
"""


def ours_by_ssh(crew: Crew, server: Address) -> Reach:
    """`tunneld` with a stock `ssh -R` in place of the agent."""
    config = crew.file("tunnel.toml", TUNNEL_TOML + SSH_TOML)
    daemon = crew.start("tunneld", [sys.executable, "-c", TUNNELD, "--config", config, "--log-format", "json"])
    port = daemon.line(_ssh_uri).port or 0
    client = crew.start("ssh", ssh.command(None, (LOOPBACK, port), server))
    return Reach((LOOPBACK, client.line(ssh.allocated)), daemon)


def _ssh_uri(line: str) -> SplitResult | None:
    fields = json.loads(line)
    return urlsplit(fields["uri"]) if fields["event"] == "ssh listens" else None


def _control_uri(line: str) -> SplitResult | None:
    fields = json.loads(line)
    return urlsplit(fields["uri"]) if fields["event"] == "control listens" else None


# Peers: the relay and the agent are two processes of the same program

HAPROXY = """
global
    nbthread 1
    maxconn {connections}
defaults
    mode tcp
    option splice-auto
    timeout connect 10s
    timeout client 10m
    timeout server 10m
listen hop
    bind {listen[0]}:{listen[1]}
    server next {server[0]}:{server[1]}
"""

STREAM = """
stream {{
    server {{
        listen {listen[0]}:{listen[1]} backlog=4096;
        proxy_pass {server[0]}:{server[1]};
    }}
}}
"""


def chain(hop: Callable[[Crew, str, Address, Address], Child]) -> Callable[[Crew, Address], Reach]:
    """Run a forwarding program twice in a row."""

    def build(crew: Crew, server: Address) -> Reach:
        for name in ("agent", "relay"):
            listen = (LOOPBACK, free_port())
            child = hop(crew, name, listen, server)
            server = child.listening(listen[1])
        return Reach(server, child)

    return build


def haproxy(crew: Crew, name: str, listen: Address, server: Address) -> Child:
    """One thread, and `splice` when HAProxy considers it useful."""
    connections = min(8000, descriptor_limit() // 3)  # two descriptors each, and some for the pipes
    config = crew.file(f"{name}.cfg", HAPROXY.format(connections=connections, listen=listen, server=server))
    return crew.start(f"haproxy ({name})", [need("haproxy"), "-db", "-q", "-f", config])


def nginx(crew: Crew, name: str, listen: Address, server: Address) -> Child:
    """The stream module with one worker."""
    (crew.folder / name).mkdir()
    text = nginx_module("stream") + nginx_basics(crew.folder / name, descriptor_limit())
    config = crew.file(f"{name}/nginx.conf", text + STREAM.format(listen=listen, server=server))
    return crew.start(f"nginx ({name})", nginx_command(config))


def socat(crew: Crew, name: str, listen: Address, server: Address) -> Child:
    """A process for each connection."""
    source = f"TCP-LISTEN:{listen[1]},bind={listen[0]},fork,reuseaddr,backlog=1024,nodelay"
    return crew.start(f"socat ({name})", [need("socat"), source, f"TCP:{server[0]}:{server[1]},nodelay"])


def openssh(crew: Crew, server: Address) -> Reach:
    """`ssh -R` and `sshd`: one encrypted connection for all visitors."""
    daemon, public = ssh.forward(crew, server)
    return Reach(public, daemon)


def ssh_jump(crew: Crew, server: Address) -> Reach:
    """`ssh -J`: encrypted end to end through a relay, which is an `sshd`, one connection for all visitors."""
    daemon, local = ssh.jump(crew, server)
    return Reach(local, daemon)


def peer(build: peers.Build) -> Callable[[Crew, Address], Reach]:
    """Another tunnel program, see peers.py."""

    def reach(crew: Crew, server: Address) -> Reach:
        public, daemon = build(crew, server)
        return Reach(public, daemon)

    return reach


TOPOLOGIES = (
    Topology("direct", "direct", (), direct, idle=False),
    Topology("tunneld", "tunneld tcp", (), ours("tcp")),
    Topology("tunneld-tls", "tunneld tcp+TLS", (), ours("tcp", tls=True)),
    Topology("webmux", "tunneld webmux", (), ours("webmux")),
    Topology("webmuxs", "tunneld webmux+TLS", (), ours("webmux", tls=True)),
    Topology("egtp", "tunneld egtp", (), ours("egtp")),
    Topology("tunneld-compiled", "compiled tcp", (COMPILED,), ours("tcp", python=COMPILED)),
    Topology("webmux-compiled", "compiled webmux", (COMPILED,), ours("webmux", python=COMPILED)),
    Topology("webmuxs-compiled", "compiled webmux+TLS", (COMPILED,), ours("webmux", tls=True, python=COMPILED)),
    Topology("egtp-compiled", "compiled egtp", (COMPILED,), ours("egtp", python=COMPILED)),
    Topology("private", "private tunnel", (), ours_private("webmux"), idle=False),
    Topology("private-tcp", "private, tcp", (), ours_private("tcp"), idle=False),
    Topology("private-compiled", "compiled private", (COMPILED,), ours_private("webmux", python=COMPILED), idle=False),
    Topology("ssh-jump", "ssh -J", ("ssh", "sshd", "ssh-keygen"), ssh_jump, idle=False),
    Topology("haproxy", "haproxy ×2", ("haproxy",), chain(haproxy)),
    Topology("nginx", "nginx stream ×2", ("nginx",), chain(nginx)),
    Topology("ssh", "ssh -R", ("ssh", "sshd", "ssh-keygen"), openssh),
    Topology("tunneld-ssh", "tunneld ssh", ("ssh",), ours_by_ssh),
    Topology("socat", "socat ×2", ("socat",), chain(socat), idle=False),
    Topology("rathole", "rathole", ("rathole",), peer(peers.rathole("tcp"))),
    Topology("rathole-tls", "rathole+TLS", ("rathole",), peer(peers.rathole("tls"))),
    Topology("rathole-noise", "rathole+Noise", ("rathole",), peer(peers.rathole("noise"))),
    Topology("frp", "frp", ("frps", "frpc"), peer(peers.frp(tls=False))),
    Topology("frp-tls", "frp+TLS", ("frps", "frpc"), peer(peers.frp(tls=True))),
    Topology("chisel", "chisel (SSH)", ("chisel",), peer(peers.chisel)),
    Topology("bore", "bore", ("bore",), peer(peers.bore)),
)
