"""The configuration file that `tunneld init` writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import tomli_w

from tunneld.backends.ssh import host_key
from tunneld.config.wording import literal
from tunneld.net.endpoint import CONTROL_PORT

CREDENTIAL = "agent"

FILE = """\
# Configuration of tunneld(8) for a public relay, written by `tunneld init`.
#
# Keys that are not set here have their defaults. `tunneld --print-config` prints all of them, tunnel.toml(5) explains
# them. After a change, run `tunneld --check`, then reload with SIGHUP.

[control]                       # control port, where agents and `tunnel` connect; see tunneld-control(7)
host = ""                       # all addresses of this machine; requires TLS and a credential, as configured below
{port:<31} # port number

[control.tls]                   # certificate of the relay, also used for agents' connections (webmux)
{certificate:<31} # self-signed; agents recognize it by --pin {pin_start}...
{key:<31} # private key; keep it secret

[http]                          # XML-RPC, JSON, /healthz and /metrics; requires a credential
{http_port}host = "127.0.0.1"              # this machine only; for remote access, set "" and enable the next two lines
{web_host}
{web_tls}

[tunnels]                       # ports for tunnels; open them in the firewall
host = ""                       # all addresses of this machine
{host:<31} # host name in the addresses of tunnels
{ports:<31} # range for client and server ports

{names}{webmux}[ssh]                           # tunnels for machines that only have an SSH client
enabled = true                  # port {ssh_port}; accepts the authorized_keys of credentials
{ssh_port_line}{host_key:<31} # [restart] fingerprint {fingerprint}

[[credential]]                  # a user of the relay; repeat this table for each
{name:<31} # name shown in lists and logs
role = "user"                   # manages only its own tunnels; "admin" manages all tunnels and the daemon
{verifier}
{authorized_keys:<31} # SSH public keys, lines as in id_ed25519.pub
max_tunnels = 20                # its open tunnels: a thief of its secret does not get every port
max_total_visitors = 2000       # visitors of all its tunnels at a time
"""


NAMES = """\
[names]                         # host names: `tunnel expose 8000 --host blog`; see HOST NAMES in tunnel.toml(5)
{domain:<31} # DNS: this name and *.{name} must lead to this machine
http = ":80"                    # ports that all host names share; they need a privilege, see tunneld(8)
https = ":443"                  # answers for names that have a certificate

{off}[acme]                          # certificates for host names, from Let's Encrypt; see CERTIFICATES in tunneld(8)
{off}enabled = true                  # needs the extra tunneld[acme]
{off}agree = true                    # you accept the terms of service: https://letsencrypt.org/repository/
#contact = "ops@example.org"    # e-mail address of the account; optional

"""
WEBMUX = """\
[webmux]                        # agents connect here
{port}

"""


@dataclass(frozen=True, slots=True)
class ServicePorts:
    """The ports of the relay's own services."""

    control: int = CONTROL_PORT
    http: int = 7011
    webmux: int = 7012
    ssh: int = 7022

    def all(self) -> tuple[int, ...]:
        """All of them."""
        return astuple(self)


@dataclass(frozen=True, slots=True)
class InitPlan:
    """The path of the configuration, and the settings that go into it."""

    config: Path
    host: str
    ports: str
    ssh_keys: Sequence[str]
    domain: str = ""  # of host names; empty: none
    agree: bool = False  # to the terms of service of Let's Encrypt
    services: ServicePorts = ServicePorts()

    @property
    def open_ports(self) -> str:
        """The ports to open in a firewall, for a sentence."""
        web = (80, 443) if self.domain else ()
        services = (self.services.control, self.services.webmux, self.services.ssh)
        return f"{', '.join(map(str, (*web, *services)))} and {self.ports}"

    @property
    def certificate(self) -> Path:
        """Path of the certificate."""
        return self.config.with_name("relay.pem")

    @property
    def key(self) -> Path:
        """Path of the private key."""
        return self.config.with_name("relay.key")

    @property
    def host_key(self) -> Path:
        """Path of the SSH host key."""
        return self.config.with_name(host_key.KEY_FILE)


def text(plan: InitPlan, pin: str, fingerprint: str, verifier: str) -> str:
    """Format the configuration file."""
    ports, usual = plan.services, ServicePorts()
    certificate, key = _line("certificate", plan.certificate.name), _line("key", plan.key.name)
    return FILE.format(
        port=_line("port", ports.control),
        http_port="" if ports.http == usual.http else _line("port", ports.http) + "\n",
        webmux="" if ports.webmux == usual.webmux else WEBMUX.format(port=_line("port", ports.webmux)),
        ssh_port_line="" if ports.ssh == usual.ssh else _line("port", ports.ssh) + "\n",
        certificate=certificate,
        key=key,
        pin_start=pin[: len("sha256:") + 8],
        host=_line("advertised_host", plan.host),
        web_host=f"#allowed_hosts = [{literal(plan.host)}]",
        web_tls=f"#tls = {{ {certificate}, {key} }}",
        ports=_line("ports", plan.ports),
        name=_line("name", CREDENTIAL),
        names=_names_tables(plan) if plan.domain else "",
        ssh_port=ports.ssh,
        host_key=_line("host_key", plan.host_key.name),
        fingerprint=fingerprint,
        verifier=_line("verifier", verifier),
        authorized_keys=_line_of_keys(plan.ssh_keys),
    )


def _names_tables(plan: InitPlan) -> str:
    return NAMES.format(domain=_line("domain", plan.domain), name=plan.domain, off="" if plan.agree else "#")


def _line_of_keys(keys: Sequence[str]) -> str:
    if not keys:
        return '#authorized_keys = ["ssh-..."]'
    return f"authorized_keys = [{', '.join(_line('key', key).partition('= ')[2] for key in keys)}]"


def _line(key: str, value: object) -> str:
    return tomli_w.dumps({key: value}).strip()
