"""`tunneld init`: write the files of a public relay, and print the command to run on the agent's machine.

    tunnel.toml    the settings that differ from the defaults, with a comment each; a verifier instead of the secret
    relay.pem      a self-signed certificate, which agents recognize by its pin
    relay.key      its private key
    ssh_host_key   the host key of the SSH port

The credential is called `agent` and has the role `user`: it can open tunnels, and list and close its own. Its secret
will be stored on machines behind NAT, in homes and in devices. If one of these is stolen, the thief should not be able
to stop the relay or list its other tunnels. The operator needs no credential: on the relay's machine there are signals
and the configuration file.

Only the user that ran it can read the files, unless the folder has the setgid bit: then the files get the folder's
group, which can read them. The Debian package prepares /etc/tunneld that way, for the relay's account.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shlex
import socket
import stat
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from tunneld.backends.ssh import host_key
from tunneld.cli.common import complain, say
from tunneld.cli.init_file import CREDENTIAL, InitPlan, ServicePorts, text
from tunneld.config import load, make_verifier
from tunneld.config.places import default_config
from tunneld.config.ssh_keys import read_public_key
from tunneld.config.values import parse_port_range
from tunneld.errors import ConfigError, UsageError, reason_of
from tunneld.net.address import parse_host_name
from tunneld.net.endpoint import is_loopback, is_wildcard, join_host_port, parse_host
from tunneld.tls.private_files import temporary_beside, write_private
from tunneld.tls.self_signed import make_self_signed

SECRET_BYTES = 24
"""Random bytes in the secret, which has 32 characters: too many to guess, even with a recorded login."""
PROBE_ADDRESSES = (("192.0.2.1", socket.AF_INET), ("2001:db8::1", socket.AF_INET6))
"""Addresses reserved for documentation (RFC 5737, RFC 3849), used to find this machine's address on the default route.
Nothing is sent to them.
"""

NO_CERTIFICATES = (
    "   Addresses begin with http until the relay has certificates. To get them from Let's Encrypt, uncomment\n"
    "   [acme] in the configuration (or use --agree), if you accept its terms of service.\n\n"
)
EXAMPLE_NAME = "blog"
UNIT = "tunneld.service"
UNIT_FOLDERS = (Path("/etc/systemd/system"), Path("/usr/lib/systemd/system"))
UNIT_CONFIG = Path("/etc/tunneld/tunnel.toml")
"""The configuration that the unit reads."""


def run(options: argparse.Namespace) -> int:
    """Write the files and print the command. Raises `UsageError`, and `ConfigError` if a file cannot be written."""
    if options.config or options.check or options.print_config or options.log_format or options.log_level:
        raise UsageError("options before `init` apply to running the daemon; use --output to say where to write")
    domain = _domain(options.domain) if options.domain is not None else ""
    _check_agreement(domain, agree=options.agree)
    host = _public_host(options.host or domain or None)
    services = ServicePorts(options.control_port, options.http_port, options.webmux_port, options.ssh_port)
    ports, keys = _ports(options.ports, services), _keys(options.ssh_key)
    plan = InitPlan(_path(options.output), host, ports, keys, domain, options.agree, services)
    secret, certificate, ssh_key = secrets.token_urlsafe(SECRET_BYTES), make_self_signed(plan.host), host_key.make()
    fingerprint = host_key.fingerprint(ssh_key)
    _write(
        {
            plan.key: certificate.key,
            plan.certificate: certificate.certificate,
            plan.host_key: ssh_key,
            plan.config: text(plan, certificate.pin, fingerprint, make_verifier(secret)).encode(),
        },
        force=options.force,
    )
    load(plan.config)  # checks the file as the daemon will
    relay = join_host_port(plan.host, plan.services.control)
    complain(_instructions(plan, fingerprint))
    say(
        f"TUNNEL_SECRET={secret} tunnel expose 8000{f' --host {EXAMPLE_NAME}' if domain else ''}"
        f" --relay tls://{relay} --credential {CREDENTIAL} --pin {certificate.pin}"
    )
    return os.EX_OK


def _instructions(plan: InitPlan, fingerprint: str) -> str:
    """What to do next. The command for the agent, which has the secret, follows on standard output."""
    forward = f"{EXAMPLE_NAME}:80" if plan.domain else "0"
    keys_hint = "" if plan.ssh_keys else f"\n   (add its public key to authorized_keys in {plan.config} first)"
    return (
        f"Wrote {plan.config}, {plan.certificate}, {plan.key} and {plan.host_key}.\n\n"
        f"1. On this machine, open ports {plan.open_ports} in the firewall,"
        " and start the relay:\n\n"
        f"    {_start_command(plan)}\n\n"
        f"{_names_instructions(plan)}"
        "2. To expose a server on port 8000 of a machine that only has an SSH client, run this command there."
        f"{keys_hint}\n   The fingerprint of the host key is {fingerprint}.\n\n"
        f"    ssh -p {plan.services.ssh} -R {forward}:localhost:8000 {plan.host}\n\n"
        "3. To manage the relay, add a credential for yourself:\n\n"
        "    tunnel credential add operator --role admin\n\n"
        "4. To expose a server on port 8000 of a machine with tunneld installed, run this command there. Keep a copy"
        " of it:\n   the secret is not stored and cannot be shown again.\n"
    )


def _start_command(plan: InitPlan) -> str:
    """The command that starts the relay: through systemd where its unit reads this configuration."""
    config = plan.config.absolute()
    if config == UNIT_CONFIG and any((folder / UNIT).exists() for folder in UNIT_FOLDERS):
        return f"systemctl enable --now {UNIT.removesuffix('.service')}"
    return f"tunneld --config {shlex.quote(str(config))}"


def _names_instructions(plan: InitPlan) -> str:
    """What host names need beside the configuration."""
    if not plan.domain:
        return ""
    return (
        f"   Host names need two DNS records of type A (for IPv6: AAAA) with the address of this machine:\n\n"
        f"    {plan.domain}.\n    *.{plan.domain}.\n\n"
        "   Ports 80 and 443 need a privilege, which the systemd unit gives.\n"
        "   Otherwise start the relay as root, and set `user` in [daemon] to an account without privileges.\n\n"
        f"{'' if plan.agree else NO_CERTIFICATES}"
    )


def _keys(files: Sequence[Path]) -> Sequence[str]:
    """Read public keys as lines of authorized_keys. Raises `UsageError`."""
    return [read_public_key(file) for file in files]


def _path(output: Path | None) -> Path:
    """Return the file to write. `output` is a folder unless it ends in .toml; without it, the file tunneld reads."""
    if output is None:
        return default_config()
    return output if output.suffix == ".toml" and not output.is_dir() else output / "tunnel.toml"


def _public_host(given: str | None) -> str:
    if given is not None:
        host = parse_host(f"[{given}]" if ":" in given and not given.startswith("[") else given)
        if is_wildcard(host):
            raise UsageError(f"--host {given} stands for all addresses; give the one that clients connect to")
        return host
    for target, family in PROBE_ADDRESSES:
        with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((target, 9))
            host = str(probe.getsockname()[0])
            if not is_loopback(host):
                complain(f"tunneld: using {host} as the public address of this machine; use --host NAME to change it")
                return host
    raise UsageError("could not find a public address of this machine; use --host NAME")


def _domain(given: str) -> str:
    """The domain of host names as the configuration has it. Raises `UsageError`."""
    name = parse_host_name(given)
    if name.is_wildcard or name.path or "." not in name.name:
        raise UsageError(f"--domain {given} is not a domain, such as t.example.org")
    return name.name


def _check_agreement(domain: str, *, agree: bool) -> None:
    """Raise `UsageError` where certificates are wanted that cannot be obtained."""
    if agree and not domain:
        raise UsageError("--agree is for certificates of host names; it requires --domain")
    if agree and find_spec("acme") is None:
        raise UsageError("--agree requires the Python package acme; install tunneld[acme]")


def _ports(given: str, services: ServicePorts) -> str:
    try:
        ports = parse_port_range(given)
    except ValueError as error:
        raise UsageError(f"--ports: {error}") from None
    if own := [port for port in services.all() if port in ports]:
        raise UsageError(f"--ports {given} contains port {own[0]}, which the relay needs for itself")
    return given


def _write(files: Mapping[Path, bytes], *, force: bool) -> None:
    """Write all files or none. Raises `UsageError` if one exists, unless `force`."""
    existing = [str(path) for path in files if path.exists() or path.is_symlink()]
    if existing and not force:
        raise UsageError(f"{' and '.join(existing)} exist already; use another --output, or --force to replace them")
    made: list[Path] = []
    path = next(iter(files))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for_group = path.parent.stat().st_mode & stat.S_ISGID
        for path, content in files.items():
            made.append(temporary_beside(path))
            write_private(made[-1], content)
            if for_group:
                made[-1].chmod(0o640)
        for path, new in zip(files, made, strict=True):
            new.replace(path)
    except OSError as error:
        raise ConfigError([f"{path}: could not write the file: {reason_of(error)}"]) from None
    finally:
        for new in made:
            new.unlink(missing_ok=True)
