"""The configuration as values that cannot be wrong: frozen, strict, every key with its default.

One class a TOML table. Past `load` nobody checks a setting again. tunnel.toml(5) describes every key, its default and
its consequence; a test holds the two together.

Numbers that are times are seconds, numbers that are sizes are octets; the comment behind a default says why that one. A
key marked `RESTART` is read once, when the daemon starts; every other key is read anew after a reload.
"""

from __future__ import annotations

import ipaddress
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from tunneld.config.certificates import check_authority, check_pair, locate, place
from tunneld.config.credentials import Credential, check_unique
from tunneld.config.values import (
    DAY,
    HOUR,
    KIB,
    MIB,
    MINUTE,
    RESTART,
    Body,
    Count,
    File,
    Folder,
    Guard,
    Loading,
    MaxStartups,
    Moment,
    NetworkList,
    Octets,
    Port,
    Seconds,
    SecondsOrNone,
    Startups,
    Table,
    VisitorRate,
    Window,
    literal,
    parse_port_range,
)
from tunneld.errors import UsageError
from tunneld.net.endpoint import CONTROL_PORT, is_loopback, is_wildcard, parse_host


def _host(value: str) -> str:
    """A host to bind or to advertise; an IPv6 address may be written with or without brackets."""
    if not value:
        return value
    try:
        if value.replace(".", "").isdigit():
            return str(ipaddress.IPv4Address(value))  # 300.1.1.1 would pass for a name
        return parse_host(f"[{value}]" if ":" in value and not value.startswith("[") else value)
    except (UsageError, ValueError):
        raise ValueError(f"{literal(value)} is not a host name or an address") from None


def _name(value: str) -> str:
    """A host name or address in a list, where an empty one can only be a slip."""
    if not value:
        raise ValueError("an empty name matches no request")
    return _host(value)


Names = Annotated[tuple[Annotated[str, AfterValidator(_name)], ...], Field(strict=False)]


class TlsFiles(Table):
    """`[control.tls]`, `[http.tls]`: the socket speaks TLS and nothing else."""

    certificate: File
    key: File
    client_ca: File | None = None

    _locate = field_validator("certificate", "key", "client_ca")(locate)

    @model_validator(mode="after")
    def _fits(self, info: ValidationInfo) -> TlsFiles:
        """Only in `load`, which says so by its context: other code may name files that are not there yet."""
        if info.context is not None:
            check_pair(self.certificate, self.key)
            if self.client_ca is not None:
                check_authority(self.client_ca)
        return self


class ControlSettings(Table):
    """`[control]`: the line protocol, tunneld-control(7)."""

    host: str = "127.0.0.1"  # without credentials nobody is asked, so only this machine may speak
    port: Port = CONTROL_PORT
    tls: TlsFiles | None = None
    open_to_anyone: Guard = False
    max_connections: Count = 256  # one agent keeps one; 256 x (two descriptors and about 60 KiB) is bearable
    max_startups: MaxStartups = "64:30:128"  # half of max_connections stays for those that are known
    max_startups_per_source: Count = 16  # an office's agents that all come back at once; an eighth of them all
    penalty: Seconds = 5.0  # OpenSSH's for a failed authentication, and so is the next
    max_penalty: Seconds = 10 * MINUTE
    handshake_timeout: Seconds = 10.0  # a TLS handshake is two round trips; 10 s is a slow satellite link
    idle_timeout: Seconds = 10 * MINUTE  # longer than a person thinks; `watch` is exempt
    write_timeout: Seconds = 30.0  # a reader that takes nothing for so long is gone

    _check_host = field_validator("host")(_host)

    @property
    def startups(self) -> Startups:
        """`max_startups` as numbers."""
        return Startups.parse(self.max_startups)

    @field_validator("open_to_anyone")
    @classmethod
    def _not_open_by_accident(cls, value: bool, info: ValidationInfo) -> bool:
        """A check of one field, not of the table, so that it speaks even while other keys of the table are wrong."""
        decided = {"host", "tls"} <= info.data.keys()
        if decided and not value and not is_loopback(info.data["host"]):
            tls: TlsFiles | None = info.data["tls"]
            credentials = isinstance(info.context, Loading) and info.context.credentials
            if credentials and tls is None:
                raise ValueError(
                    f"is false, but host {literal(info.data['host'])} has credentials and no [control.tls]: whoever is "
                    "on the way takes a connection over once it has authenticated; add that table, or open_to_anyone "
                    "= true where the way is safe"
                )
            if not credentials and (tls is None or tls.client_ca is None):
                raise ValueError(
                    f"is false, but host {literal(info.data['host'])} lets strangers open tunnels: set tls.client_ca "
                    "so that only your certificates may, add a [[credential]] and [control.tls], or open_to_anyone = "
                    "true where a firewall stands in front"
                )
        return value


class HttpSettings(Table):
    """`[http]`: XML-RPC, JSON, health and metrics."""

    enabled: bool = True
    host: str = "127.0.0.1"
    port: Port = 7011
    tls: TlsFiles | None = None
    open_to_anyone: Guard = False
    allowed_hosts: Names = ()  # beside loopback's names: a page on another site must not reach us
    max_connections: Count = 256  # each is a descriptor and one or two tasks, as with control.max_connections
    max_body: Body = 64 * KIB  # the largest honest request is below 1 KiB
    read_timeout: Seconds = 10.0  # a body of 64 KiB over a modem
    keep_alive_timeout: Seconds = 30.0
    write_timeout: Seconds = 30.0  # a reader that takes nothing for so long is gone

    _check_host = field_validator("host")(_host)

    @field_validator("open_to_anyone")
    @classmethod
    def _not_open_by_accident(cls, value: bool, info: ValidationInfo) -> bool:
        listens = info.data.get("enabled", False) and {"host", "tls"} <= info.data.keys()
        if not listens or value or is_loopback(info.data["host"]):
            return value
        tls: TlsFiles | None = info.data["tls"]
        credentials = isinstance(info.context, Loading) and info.context.credentials
        if tls is not None and (credentials or tls.client_ca is not None):
            return value
        raise ValueError(
            f"is false, but host {literal(info.data['host'])} lets strangers open tunnels, or listen to the secrets of "
            "those who may: add a [[credential]] and [http.tls], keep it on loopback behind a proxy that asks who they "
            "are, or set open_to_anyone = true where a firewall stands in front"
        )


class TunnelSettings(Table):
    """`[tunnels]`: where tunnels listen, how many there may be, how long anything waits. Read at each openTunnel."""

    host: str = "127.0.0.1"  # nothing is public until somebody says so
    advertised_host: str = ""
    ports: str = "20000-29999"  # below Linux's ephemeral range (32768-60999), so no outgoing connection takes one
    max_tunnels: Count = 1000
    max_visitors: Count = 10_000  # per tunnel: two descriptors each
    max_parked: Count = 256  # per tunnel: server connections held for visitors to come
    max_waiting: Count = 1024  # per tunnel: visitors held for server connections to come; a burst waits for carriers
    pairing_timeout: Seconds = 30.0  # a browser gives up about then
    open_timeout: Seconds = 5 * MINUTE  # time to copy a URI from one machine to another
    reservation: SecondsOrNone = 7 * DAY  # a laptop that is closed on Friday and opened after a long weekend
    max_reservations: Count = 2500  # with two ports each, half of `ports` stays free for everybody else
    max_reservations_per_owner: Count = 64  # a person's services several times over; forty owners may have that many
    linger: Seconds = MINUTE  # a half-closed relay without a byte for so long is abandoned
    accept_backoff: Annotated[Seconds, RESTART] = 0.1  # out of descriptors: no spinning, yet nobody notices the pause
    keepalive: Seconds = MINUTE  # TCP keep-alive: carrier NATs forget idle connections after 2 minutes and more
    allow_from: NetworkList = ()
    deny_from: NetworkList = ()
    max_per_source: Annotated[int | None, Field(ge=1, le=1_000_000)] = None  # whole offices come from one address
    visitor_rate: VisitorRate | None = None
    bandwidth: Octets = None  # per tunnel and second; None: what the machine can
    quota: Octets = None  # per tunnel, in its whole life
    max_sources: Count = 16_384  # per tunnel: 150 octets each, a tenth of what max_visitors relays take
    trusted_proxies: NetworkList = ()
    proxy_header_timeout: Seconds = 5.0  # the specification asks for 3 s at least: a lost packet comes again by then

    _check_hosts = field_validator("host", "advertised_host")(_host)

    @field_validator("advertised_host")
    @classmethod
    def _can_be_dialled(cls, value: str) -> str:
        if value and is_wildcard(value):
            raise ValueError(f"{literal(value)} means every address of this machine; nobody can connect to it")
        return value

    @field_validator("ports")
    @classmethod
    def _check_ports(cls, value: str) -> str:
        parse_port_range(value)
        return value

    @property
    def port_range(self) -> range:
        """The ports a tunnel may listen on; `range(0, 1)` means any free port."""
        return parse_port_range(self.ports)


class WebMuxSettings(Table):
    """`[webmux]`: the shared port to which hidden servers connect their carriers. TLS is that of `[control.tls]`."""

    enabled: bool = True
    host: str | None = None  # None: where tunnels listen
    port: Port = 7012
    max_carriers: Count = 80  # per tunnel, as many as max_visitors need: 126 each; agents open them as they need them
    handshake_timeout: Seconds = 10.0  # TLS and the definition of an endpoint, as for the control port
    heartbeat: Seconds = 10.0  # a dead hidden server is given up within three; a question and its answer are 200 octets
    patience: Seconds = 2.0  # for that answer; then visitors go to another carrier, where there is one
    max_window: Window = 8 * MIB  # what 600 Mbit/s over 100 ms have on the way
    carrier_memory: Window = 32 * MIB  # what all windows of a carrier may grow by, held if nobody reads

    _check_host = field_validator("host")(lambda value: value if value is None else _host(value))


class SshSettings(Table):
    """`[ssh]`: the shared port to which hidden servers connect with nothing but an ssh client."""

    enabled: bool = False  # a port and a key that stays are to be wanted; `tunneld init` wants them
    host: str | None = None  # None: where tunnels listen
    port: Port = 7022
    host_key: Annotated[File | None, RESTART] = None  # None: in the state folder, see hostkey.py
    max_connections: Count = 256  # of known ones and strangers: a descriptor, a task and about 100 KiB each
    max_forwards: Count = 32  # -R per connection: what a person writes on a line, and some
    max_channels: Count = 1000  # visitors at once per connection: ssh needs a descriptor each, and mostly has 1024
    max_carriers: Count = 16  # connections with the same key, per tunnel
    login_timeout: Seconds = 30.0  # a person types a passphrase; OpenSSH waits for 120 s
    dial_timeout: Seconds = 30.0  # for the ssh to reach its server; a browser gives up about then, TCP after 127 s
    heartbeat: Seconds = 10.0  # as for webmux: a dead hidden server is given up within three
    patience: Seconds = 2.0  # for a sign of life, before a newcomer takes the place of a silent one
    max_window: Window = 8 * MIB  # as for webmux
    connection_memory: Window = 32 * MIB
    rekey_octets: Annotated[int, Field(ge=MIB, le=64 * 1024 * MIB)] = (
        32 * 1024 * MIB
    )  # half of what GCM takes (RFC 4344)
    rekey_interval: Seconds = HOUR  # RFC 4253, section 9

    _check_host = field_validator("host")(lambda value: value if value is None else _host(value))
    _locate = field_validator("host_key")(place)


class DaemonSettings(Table):
    """`[daemon]`: the process itself."""

    user: Annotated[str, RESTART] = ""  # whom root becomes; the systemd unit says who it is instead
    group: Annotated[str, RESTART] = ""
    drain_timeout: Seconds = 30.0  # how long relays may finish after SIGTERM; systemd stops waiting at 90 s
    state: Annotated[Folder | None, RESTART] = None  # None: the usual place, see places.py
    spin: Annotated[Moment, RESTART] = 0.0001  # what it takes a processor to fall asleep and be woken
    watch_backlog: Count = 1000  # events held for one slow watcher before it loses some

    _place = field_validator("state")(place)


class LogSettings(Table):
    """`[log]`: one event a line on standard error."""

    format: Literal["auto", "human", "json"] = "auto"
    level: Literal["debug", "info", "warning", "error"] = "info"


class Settings(Table):
    """A whole tunnel.toml."""

    control: ControlSettings = ControlSettings()
    http: HttpSettings = HttpSettings()
    tunnels: TunnelSettings = TunnelSettings()
    webmux: WebMuxSettings = WebMuxSettings()
    ssh: SshSettings = SshSettings()
    daemon: DaemonSettings = DaemonSettings()
    log: LogSettings = LogSettings()
    credential: Annotated[tuple[Credential, ...], Field(strict=False)] = ()

    @field_validator("credential")
    @classmethod
    def _check_credentials(cls, value: tuple[Credential, ...], info: ValidationInfo) -> tuple[Credential, ...]:
        """Each on its own is right by now; are they together?"""
        check_unique(value)
        faces: list[ControlSettings | HttpSettings | None] = [info.data.get("control"), info.data.get("http")]
        if None not in faces and not any(face and face.tls and face.tls.client_ca for face in faces):
            for credential in value:
                if credential.certificate is not None:
                    raise ValueError(
                        f"{literal(credential.name)} has a certificate, but without control.tls.client_ca or "
                        "http.tls.client_ca nobody is asked for one"
                    )
        return value
