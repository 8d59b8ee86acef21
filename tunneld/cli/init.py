"""`tunneld init`: everything that a relay on a public address needs, and the one line for the other machine.

    tunnel.toml    what is not a default, each key with its reason; a verifier, from which the secret cannot be computed
    relay.pem      a self-signed certificate, which the other machine knows by its pin
    relay.key      its key
    ssh_host_key   the key by which ssh knows it

The credential is called `agent` and is a user: it opens tunnels, and sees and ends its own. Its secret will lie on
machines behind NAT, in homes and in devices; who takes one of those should not get to stop the relay or to see what
else runs there. Who may do that is on the relay's machine already, and has signals and the file.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shlex
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import tomli_w

from tunneld.backends.ssh import host_key
from tunneld.cli.common import complain, say
from tunneld.cli.public_key import read_public_key
from tunneld.config import load, make_verifier
from tunneld.config.places import default_config
from tunneld.config.values import literal, parse_port_range
from tunneld.errors import ConfigError, UsageError, reason_of
from tunneld.net.endpoint import CONTROL_PORT, is_loopback, is_wildcard, join_host_port, parse_host
from tunneld.tls.self_signed import make_self_signed

CARRIER_PORT = 7012
SSH_PORT = 7022
CREDENTIAL = "agent"
SECRET_OCTETS = 24
"""Of randomness, 32 characters: nobody guesses them, with whatever they overheard."""
SOMEWHERE = (("192.0.2.1", socket.AF_INET), ("2001:db8::1", socket.AF_INET6))
"""Addresses of nobody (RFC 5737, RFC 3849), to ask the routing table for the way out; nothing is sent there."""

FILE = """\
# tunnel.toml: the configuration of tunneld(8), for a relay that everybody may reach. Written by `tunneld init`.
#
# Every key that is not here has its default; `tunneld --print-config` shows them all, tunnel.toml(5) explains them.
# After an edit: `tunneld --check`, then reload with SIGHUP.

[control]                       # where `tunnel` and hidden servers ask for tunnels: tunneld-control(7)
host = ""                       # on every address of this machine; safe because of the two tables below
{port:<31} # its port

[control.tls]                   # nobody on the way can listen or meddle
{certificate:<31} # self-signed; clients know it by --pin {pin_start}...
{key:<31} # whoever has it can pose as this relay

[http]                          # XML-RPC, JSON, /healthz, /metrics: for programs on this machine, with a credential
host = "127.0.0.1"              # "" for others, too: they need the same credential, and the two lines below
{web_host}
{web_tls}

[tunnels]                       # where visitors and hidden servers connect: open these ports in the firewall, too
host = ""                       # on every address of this machine
{host:<31} # the name in the addresses that are given out
{ports:<31} # the ports of both sides of all tunnels

[ssh]                           # for hidden servers that have nothing but ssh
enabled = true                  # port {ssh_port}, for the authorized_keys of a credential
{host_key:<31} # [restart] ssh shows it as {fingerprint}

[[credential]]                  # who may open tunnels; repeat the table for each
{name:<31} # shown in lists and logs
role = "user"                   # its own tunnels only; "admin" sees and ends all, reloads and stops the daemon
{verifier}
{authorized_keys:<31} # who may come with ssh: lines as in id_ed25519.pub
"""


@dataclass(frozen=True, slots=True)
class InitPlan:
    """Where things go, and what they are to say."""

    config: Path
    host: str
    ports: str
    ssh_keys: Sequence[str]

    @property
    def certificate(self) -> Path:
        """Beside the configuration."""
        return self.config.with_name("relay.pem")

    @property
    def key(self) -> Path:
        """Beside the configuration."""
        return self.config.with_name("relay.key")

    @property
    def host_key(self) -> Path:
        """Beside the configuration."""
        return self.config.with_name(host_key.KEY_FILE)


def run(options: argparse.Namespace) -> int:
    """Write the files and print the line. Raises `UsageError`, and `ConfigError` where a file cannot be written."""
    if options.config or options.check or options.print_config or options.log_format or options.log_level:
        raise UsageError("the options in front of init are for running the daemon; where to write is said by --output")
    plan = InitPlan(_place(options.output), _public_host(options.host), _ports(options.ports), _keys(options.ssh_key))
    secret, papers, ssh_key = secrets.token_urlsafe(SECRET_OCTETS), make_self_signed(plan.host), host_key.make()
    fingerprint = host_key.fingerprint(ssh_key)
    _write(
        {
            plan.key: papers.key,
            plan.certificate: papers.certificate,
            plan.host_key: ssh_key,
            plan.config: text(plan, papers.pin, fingerprint, make_verifier(secret)).encode(),
        },
        force=options.force,
    )
    load(plan.config)  # as the daemon will; were it wrong, better now
    relay = join_host_port(plan.host, CONTROL_PORT)
    complain(
        f"wrote {plan.config}, {plan.certificate}, {plan.key}, {plan.host_key}\n\n"
        f"Here, start the relay; ports {CONTROL_PORT}, {CARRIER_PORT}, {SSH_PORT} and {plan.ports} must be open to the "
        "world:\n\n"
        f"    tunneld --config {shlex.quote(str(plan.config.absolute()))}\n\n"
        "On another machine that has nothing but ssh, with a server on port 8000"
        f"{_where_keys_go(plan)}; the relay's key is\n{fingerprint}:\n\n"
        f"    ssh -p {SSH_PORT} -R 0:localhost:8000 {plan.host}\n\n"
        "On the other machine, with a server on port 8000 (the secret is shown only now):\n"
    )
    say(f"TUNNEL_SECRET={secret} tunnel expose 8000 --relay tls://{relay} --credential {CREDENTIAL} --pin {papers.pin}")
    return os.EX_OK


def text(plan: InitPlan, pin: str, fingerprint: str, verifier: str) -> str:
    """The configuration file."""
    certificate, key = _line("certificate", plan.certificate.name), _line("key", plan.key.name)
    return FILE.format(
        port=_line("port", CONTROL_PORT),
        certificate=certificate,
        key=key,
        pin_start=pin[: len("sha256:") + 8],
        host=_line("advertised_host", plan.host),
        web_host=f"#allowed_hosts = [{literal(plan.host)}]",
        web_tls=f"#tls = {{ {certificate}, {key} }}",
        ports=_line("ports", plan.ports),
        name=_line("name", CREDENTIAL),
        ssh_port=SSH_PORT,
        host_key=_line("host_key", plan.host_key.name),
        fingerprint=fingerprint,
        verifier=_line("verifier", verifier),
        authorized_keys=_line_of_keys(plan.ssh_keys),
    )


def _keys(files: Sequence[Path]) -> Sequence[str]:
    """Public keys, as lines of authorized_keys. Raises `UsageError`."""
    return [read_public_key(file) for file in files]


def _where_keys_go(plan: InitPlan) -> str:
    return "" if plan.ssh_keys else f" (first put its public key into authorized_keys in\n{plan.config})"


def _line_of_keys(keys: Sequence[str]) -> str:
    if not keys:
        return '#authorized_keys = ["ssh-..."]'
    return f"authorized_keys = [{', '.join(_line('key', key).partition('= ')[2] for key in keys)}]"


def _line(key: str, value: object) -> str:
    return tomli_w.dumps({key: value}).strip()


def _place(output: Path | None) -> Path:
    """The file to write: where `tunneld` looks, or what was named, which is a folder unless it ends in .toml."""
    if output is None:
        return default_config()
    return output if output.suffix == ".toml" and not output.is_dir() else output / "tunnel.toml"


def _public_host(given: str | None) -> str:
    if given is not None:
        host = parse_host(f"[{given}]" if ":" in given and not given.startswith("[") else given)
        if is_wildcard(host):
            raise UsageError(f"--host {given} is every address of a machine; give the one that clients dial")
        return host
    for target, family in SOMEWHERE:
        with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((target, 9))
            host = str(probe.getsockname()[0])
            if not is_loopback(host):
                complain(f"tunneld: this machine is advertised as {host}; where clients know it otherwise, give --host")
                return host
    raise UsageError("could not tell by what name clients reach this machine: give --host")


def _ports(given: str) -> str:
    try:
        parse_port_range(given)
    except ValueError as error:
        raise UsageError(f"--ports: {error}") from None
    return given


def _write(files: Mapping[Path, bytes], *, force: bool) -> None:
    """All of them or none, for the eyes of this user only. Raises `UsageError` rather than lose what is there."""
    there = [str(path) for path in files if path.exists() or path.is_symlink()]
    if there and not force:
        raise UsageError(f"{' and '.join(there)} would be lost: choose another --output, or say --force")
    made: list[Path] = []
    path = next(iter(files))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for path, content in files.items():
            made.append(path.with_name(f".{path.name}.{os.getpid()}"))
            _write_new(made[-1], content)
        for path, new in zip(files, made, strict=True):
            new.replace(path)
    except OSError as error:
        raise ConfigError([f"{path}: could not be written: {reason_of(error)}"]) from None
    finally:
        for new in made:
            new.unlink(missing_ok=True)


def _write_new(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
