"""Tunnel programs that people choose instead, each started as its own documentation says, on free ports.

What a program encrypts with is on in the column that says so; where it can do without, that is a column of its own.
None of them is given less than its defaults: their logs go to a file, as ours do.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, load_pem_private_key, pkcs12
from cryptography.x509 import load_pem_x509_certificate

from benchmarks.processes import LOOPBACK, Address, BenchError, Child, Crew, free_port, need
from tunneld.tls.self_signed import make_self_signed

Build = Callable[[Crew, Address], tuple[Address, Child]]
"""Runs both ends in front of a server; gives where clients connect, and the end that they meet there."""
BORE_CONTROL = 7835
HOST = "localhost"
"""What the relay's certificate says."""

# rathole: a control connection, and one for each visitor, of which it keeps a few ready. Its README, docs/transport.md.
# `nodelay` is said to be the default; in 0.5.0 a lone small request takes 20 ms in TLS unless it is asked for.

RATHOLE_SERVER = """
[server]
bind_addr = "{relay[0]}:{relay[1]}"
[server.services.bench]
token = "bench"
bind_addr = "{public[0]}:{public[1]}"
nodelay = true
"""
RATHOLE_CLIENT = """
[client]
remote_addr = "{relay[0]}:{relay[1]}"
[client.services.bench]
token = "bench"
local_addr = "{server[0]}:{server[1]}"
nodelay = true
"""
PASSWORD = "bench"


def rathole(transport: str) -> Build:
    """With `transport` tcp (nothing is encrypted), tls or noise."""

    def build(crew: Crew, server: Address) -> tuple[Address, Child]:
        relay, public = (LOOPBACK, free_port()), (LOOPBACK, free_port())
        secure = {"tcp": _nothing, "tls": _rathole_tls, "noise": _rathole_noise}[transport](crew)
        here = RATHOLE_SERVER.format(relay=relay, public=public) + secure[0]
        there = RATHOLE_CLIENT.format(relay=relay, server=server) + secure[1]
        daemon = crew.start("rathole (relay)", [need("rathole"), "--server", crew.file("server.toml", here)])
        crew.start("rathole (agent)", [need("rathole"), "--client", crew.file("client.toml", there)])
        return daemon.listening(public[1]), daemon

    return build


def _nothing(_: Crew) -> tuple[str, str]:
    return "", ""


def _rathole_tls(crew: Crew) -> tuple[str, str]:
    papers = make_self_signed(HOST)
    certificate = load_pem_x509_certificate(papers.certificate)
    key = load_pem_private_key(papers.key, None)
    assert isinstance(key, EllipticCurvePrivateKey)
    identity = crew.folder / "identity.pfx"
    sealed = BestAvailableEncryption(PASSWORD.encode())
    identity.write_bytes(pkcs12.serialize_key_and_certificates(b"bench", key, certificate, None, sealed))
    root = crew.file("root.pem", papers.certificate.decode())
    return (
        f'[server.transport]\ntype = "tls"\ntls = {{ pkcs12 = "{identity}", pkcs12_password = "{PASSWORD}" }}\n',
        f'[client.transport]\ntype = "tls"\ntls = {{ trusted_root = "{root}", hostname = "{HOST}" }}\n',
    )


def _rathole_noise(_: Crew) -> tuple[str, str]:
    made = subprocess.run([need("rathole"), "--genkey"], capture_output=True, text=True, check=False, timeout=10)
    keys = re.findall(r"[A-Za-z0-9+/]{42,}=", made.stdout)
    if len(keys) != 2:
        raise BenchError(f"rathole --genkey made no keys: {made.stderr.strip()}")
    private, public = keys
    return (
        f'[server.transport]\ntype = "noise"\nnoise = {{ local_private_key = "{private}" }}\n',
        f'[client.transport]\ntype = "noise"\nnoise = {{ remote_public_key = "{public}" }}\n',
    )


# frp: all visitors on one connection (yamux), in TLS unless told otherwise. Its conf/*_full_example.toml.

FRPS = """
bindAddr = "{relay[0]}"
bindPort = {relay[1]}
log.level = "warn"
"""
FRPC = """
serverAddr = "{relay[0]}"
serverPort = {relay[1]}
log.level = "warn"
transport.tls.enable = {tls}
[[proxies]]
name = "bench"
type = "tcp"
localIP = "{server[0]}"
localPort = {server[1]}
remotePort = {public}
"""


def frp(*, tls: bool) -> Build:
    """`frps` and `frpc`."""

    def build(crew: Crew, server: Address) -> tuple[Address, Child]:
        relay, public = (LOOPBACK, free_port()), free_port()
        here = crew.file("frps.toml", FRPS.format(relay=relay))
        there = FRPC.format(relay=relay, server=server, public=public, tls=str(tls).lower())
        daemon = crew.start("frps", [need("frps"), "-c", here])
        daemon.listening(relay[1])  # its agent gives up where it cannot log in at once
        crew.start("frpc", [need("frpc"), "-c", crew.file("frpc.toml", there)])
        return daemon.listening(public), daemon

    return build


def chisel(crew: Crew, server: Address) -> tuple[Address, Child]:
    """All visitors on one connection, SSH inside a WebSocket: always encrypted."""
    port, public = free_port(), free_port()
    daemon = crew.start(
        "chisel (relay)", [need("chisel"), "server", "--host", LOOPBACK, "--port", str(port), "--reverse"]
    )
    daemon.listening(port)
    remote = f"R:{LOOPBACK}:{public}:{server[0]}:{server[1]}"
    crew.start("chisel (agent)", [need("chisel"), "client", f"http://{LOOPBACK}:{port}", remote])
    return daemon.listening(public), daemon


def bore(crew: Crew, server: Address) -> tuple[Address, Child]:
    """A connection for each visitor, made when it comes; nothing is encrypted. Its control port is fixed."""
    public = free_port()
    daemon = crew.start("bore (relay)", [need("bore"), "server", "--bind-addr", LOOPBACK])
    daemon.listening(BORE_CONTROL)
    agent = [need("bore"), "local", str(server[1]), "--local-host", server[0], "--to", LOOPBACK, "--port", str(public)]
    crew.start("bore (agent)", agent)
    return daemon.listening(public), daemon
