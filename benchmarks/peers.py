"""Other tunnel programs, each started on free ports as its own documentation says.

A program that can run with and without encryption has a column for each. All run with their defaults, and their logs go
to a file, like those of tunneld.
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
"""Starts relay and agent for a server. Returns the address for clients, and the relay process."""
BORE_CONTROL = 7835
HOST = "localhost"
"""The name in the relay's certificate."""

# rathole: a control connection, and one for each visitor, of which it keeps a few ready. See its README and
# docs/transport.md. `nodelay` is documented as the default, but 0.5.0 needs 20 ms for a TLS request without it.

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
    """Start rathole with `transport` tcp (unencrypted), tls or noise."""

    def build(crew: Crew, server: Address) -> tuple[Address, Child]:
        relay, public = (LOOPBACK, free_port()), (LOOPBACK, free_port())
        secure = {"tcp": _unencrypted, "tls": _rathole_tls, "noise": _rathole_noise}[transport](crew)
        here = RATHOLE_SERVER.format(relay=relay, public=public) + secure[0]
        there = RATHOLE_CLIENT.format(relay=relay, server=server) + secure[1]
        daemon = crew.start("rathole (relay)", [need("rathole"), "--server", crew.file("server.toml", here)])
        crew.start("rathole (agent)", [need("rathole"), "--client", crew.file("client.toml", there)])
        return daemon.listening(public[1]), daemon

    return build


def _unencrypted(_: Crew) -> tuple[str, str]:
    return "", ""


def _rathole_tls(crew: Crew) -> tuple[str, str]:
    made = make_self_signed(HOST)
    certificate = load_pem_x509_certificate(made.certificate)
    key = load_pem_private_key(made.key, None)
    assert isinstance(key, EllipticCurvePrivateKey)
    identity = crew.folder / "identity.pfx"
    sealed = BestAvailableEncryption(PASSWORD.encode())
    identity.write_bytes(pkcs12.serialize_key_and_certificates(b"bench", key, certificate, None, sealed))
    root = crew.file("root.pem", made.certificate.decode())
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


# frp: one connection (yamux) for all visitors, with TLS by default. See its conf/*_full_example.toml.

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
    """Start `frps` and `frpc`."""

    def build(crew: Crew, server: Address) -> tuple[Address, Child]:
        relay, public = (LOOPBACK, free_port()), free_port()
        here = crew.file("frps.toml", FRPS.format(relay=relay))
        there = FRPC.format(relay=relay, server=server, public=public, tls=str(tls).lower())
        daemon = crew.start("frps", [need("frps"), "-c", here])
        daemon.listening(relay[1])  # the agent gives up if it cannot log in at once
        crew.start("frpc", [need("frpc"), "-c", crew.file("frpc.toml", there)])
        return daemon.listening(public), daemon

    return build


def chisel(crew: Crew, server: Address) -> tuple[Address, Child]:
    """Start chisel: one connection for all visitors, SSH inside a WebSocket, always encrypted."""
    port, public = free_port(), free_port()
    daemon = crew.start(
        "chisel (relay)", [need("chisel"), "server", "--host", LOOPBACK, "--port", str(port), "--reverse"]
    )
    daemon.listening(port)
    remote = f"R:{LOOPBACK}:{public}:{server[0]}:{server[1]}"
    crew.start("chisel (agent)", [need("chisel"), "client", f"http://{LOOPBACK}:{port}", remote])
    return daemon.listening(public), daemon


def bore(crew: Crew, server: Address) -> tuple[Address, Child]:
    """Start bore: one connection for each visitor, made on demand, unencrypted. Its control port is fixed."""
    public = free_port()
    daemon = crew.start("bore (relay)", [need("bore"), "server", "--bind-addr", LOOPBACK])
    daemon.listening(BORE_CONTROL)
    agent = [need("bore"), "local", str(server[1]), "--local-host", server[0], "--to", LOOPBACK, "--port", str(public)]
    crew.start("bore (agent)", agent)
    return daemon.listening(public), daemon
