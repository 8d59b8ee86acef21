"""The configuration as validated, immutable objects: one class per TOML table, every key with its default.

Settings are checked here and nowhere else. tunnel.toml(5) describes every key, its default and its consequence; a test
compares the two.

Times are in seconds and sizes in bytes; the comment behind a default gives its reason. A key marked `RESTART` is read
once, when the daemon starts; every other key applies after a reload.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from tunneld.config.certificates import AcmeSettings, NamedCertificate, TlsFiles
from tunneld.config.credentials import Credential, check_unique
from tunneld.config.http import HttpSettings
from tunneld.config.names import NamesSettings
from tunneld.config.paths import absolute_path
from tunneld.config.reporting import EventsSettings, LogSettings, MetricsSettings, RecordsSettings
from tunneld.config.values import (
    DAY,
    HOUR,
    MIB,
    MINUTE,
    RESTART,
    ByteCount,
    Count,
    File,
    Folder,
    Fraction,
    Loading,
    MaxStartups,
    NetworkList,
    Port,
    Reserved,
    Seconds,
    SecondsOrNone,
    SpinSeconds,
    Startups,
    Table,
    ValidatedBool,
    VisitorRate,
    WindowSize,
    check_host,
    known_port_range,
    parse_port_range,
)
from tunneld.config.wording import literal
from tunneld.errors import UsageError
from tunneld.net.endpoint import CONTROL_PORT, is_loopback, is_wildcard
from tunneld.policy.site_rules import AuthUrl


def _service(value: str) -> str:
    """Check a URL, or the absolute path of a program."""
    if not value or value.startswith("/"):
        return value
    try:
        AuthUrl.parse(value)
    except UsageError:
        raise ValueError(
            f"{literal(value)} is neither a URL (http://127.0.0.1:9000/tunneld) nor the absolute path of a program"
        ) from None
    return value


AuthorizeEvents = Annotated[tuple[Literal["login", "open", "visitor"], ...], Field(strict=False)]


class ControlSettings(Table):
    """`[control]`: the control protocol, tunneld-control(7)."""

    host: str = "127.0.0.1"  # without credentials there is no authentication, so only this machine may connect
    port: Port = CONTROL_PORT
    tls: TlsFiles | None = None
    open_to_anyone: ValidatedBool = False
    max_connections: Count = 256  # one per agent; each costs two descriptors and about 60 KiB
    reserved_connections: Reserved = 8  # some operators with a board each, and their commands
    credential_share: Fraction = 0.5  # two credentials have to be hostile before a third one is kept out
    max_watchers: Count = 16  # per credential: `watch` connections, of which a person needs one per screen
    max_startups: MaxStartups = "64:30:128"  # beside max_connections: half as many
    max_startups_per_source: Count = 16  # agents of one office that all reconnect at once; an eighth of the total
    penalty: Seconds = 5.0  # as in OpenSSH for a failed authentication, like the next
    max_penalty: Seconds = 10 * MINUTE
    abandoned_handshakes: VisitorRate = "30/m"  # of one source: an office whose agents give up on a busy relay
    trusted_networks: NetworkList = ()
    known_address_time: Seconds = DAY  # an agent on a machine that is off at night
    kept_places: Count = 4  # agents that log in at once behind a blocked address: a login takes three round trips
    handshake_timeout: Seconds = 10.0  # a TLS handshake is two round trips; 10 s is a slow satellite link
    idle_timeout: Seconds = 10 * MINUTE  # longer than a person needs for a command; `watch` is exempt
    write_timeout: Seconds = 30.0  # a peer that reads nothing for so long is gone
    authorize: Annotated[str, AfterValidator(_service)] = ""  # the credentials of this file decide alone
    authorize_events: AuthorizeEvents = ("login", "open")  # a question for each visitor costs each its round trip
    authorize_timeout: Seconds = 5.0  # a person waits
    authorize_cache: SecondsOrNone = MINUTE  # how long a user that was removed elsewhere may go on
    max_authorizing: Count = 64  # questions at a time: a connection or a process each

    _check_host = field_validator("host")(check_host)

    @property
    def startups(self) -> Startups:
        """`max_startups` as numbers."""
        return Startups.parse(self.max_startups)

    @field_validator("open_to_anyone")
    @classmethod
    def _check_exposure(cls, value: bool, info: ValidationInfo) -> bool:
        """Refuse a reachable port without authentication. A check of one field, not of the table: it also runs if other
        keys of the table are wrong.
        """
        is_known = {"host", "tls"} <= info.data.keys()
        if is_known and not value and not is_loopback(info.data["host"]):
            tls: TlsFiles | None = info.data["tls"]
            credentials = isinstance(info.context, Loading) and info.context.credentials
            if credentials and tls is None:
                raise ValueError(
                    f"is false, but host {literal(info.data['host'])} has credentials and no [control.tls], so an "
                    "authenticated connection can be hijacked; add [control.tls], or set open_to_anyone = true if the "
                    "network is trusted"
                )
            if not credentials and (tls is None or tls.client_ca is None):
                raise ValueError(
                    f"is false, but host {literal(info.data['host'])} lets anyone open tunnels; add a [[credential]] "
                    "and [control.tls], set tls.client_ca to require client certificates, or set open_to_anyone = true "
                    "behind a firewall"
                )
        return value


class TunnelSettings(Table):
    """`[tunnels]`: where tunnels listen, limits and timeouts. Applied to tunnels opened from then on."""

    host: str = "127.0.0.1"  # nothing is public by default
    advertised_host: str = ""
    ports: str = "20000-29999"  # below Linux's ephemeral range (32768-60999), which outgoing connections use
    max_tunnels: Count = 1000
    max_visitors: Count = 10_000  # per tunnel: two descriptors each
    max_parked: Count = 256  # per tunnel: idle server connections that wait for a visitor
    parked_check: Seconds = 10.0  # NATs forget connections after 30 s or more; a probe and its answer are 120 bytes
    max_waiting: Count = 1024  # per tunnel: visitors that wait for a server connection, as in a burst
    pairing_timeout: Seconds = 30.0  # browsers give up after about that time
    open_timeout: Seconds = 5 * MINUTE  # time to copy a URI from one machine to another
    reservation: SecondsOrNone = 7 * DAY  # a laptop that is off over a long weekend
    max_reservations: Count = 2500  # with two ports each, half of `ports` stays free
    max_reservations_per_owner: Count = 64  # several times the services of one person; room for forty owners
    port_quarantine: SecondsOrNone = MINUTE  # clients of a closed tunnel, and its agents, try again for about that time
    linger: Seconds = MINUTE  # a half-closed connection without traffic for so long is closed
    unacknowledged_timeout: SecondsOrNone = MINUTE  # outages of networks are shorter; TCP itself tries for 15 minutes
    accept_backoff: Annotated[Seconds, RESTART] = 0.1  # out of descriptors: no busy loop, and too short to notice
    keepalive: Seconds = MINUTE  # TCP keep-alive: carrier NATs drop connections that are idle for 2 minutes or more
    allow_from: NetworkList = ()
    deny_from: NetworkList = ()
    max_per_source: Annotated[int | None, Field(ge=1, le=1_000_000)] = None  # a whole office shares one address
    visitor_rate: VisitorRate | None = None
    bandwidth: ByteCount = None  # per tunnel and second; None: no limit
    quota: ByteCount = None  # per tunnel, over its whole life
    max_sources: Count = 16_384  # per tunnel: 150 bytes each, a tenth of the memory of max_visitors connections
    trusted_proxies: NetworkList = ()
    proxy_header_timeout: Seconds = 5.0  # the specification requires at least 3 s, enough for a retransmission

    _check_hosts = field_validator("host", "advertised_host")(check_host)

    @field_validator("advertised_host")
    @classmethod
    def _check_advertised(cls, value: str) -> str:
        if value and is_wildcard(value):
            raise ValueError(f"{literal(value)} means all addresses of this machine, so clients cannot connect to it")
        return value

    @field_validator("ports")
    @classmethod
    def _check_ports(cls, value: str) -> str:
        parse_port_range(value)
        return value

    @property
    def port_range(self) -> range:
        """The ports on which a tunnel may listen; `range(0, 1)` means any free port."""
        return known_port_range(self.ports)


class WebMuxSettings(Table):
    """`[webmux]`: the shared port to which agents connect their carriers. It uses the TLS of `[control.tls]`."""

    enabled: bool = True
    host: str | None = None  # None: as tunnels.host
    port: Port = 7012
    max_carriers: Count = 80  # per tunnel: max_visitors at 126 each; agents open them on demand
    handshake_timeout: Seconds = 10.0  # TLS and the definition of an endpoint, as for the control port
    heartbeat: Seconds = 10.0  # a dead carrier is closed within three; a ping and its answer are 200 bytes
    patience: Seconds = 2.0  # for that answer; after that, visitors go to another carrier, if there is one
    max_window: WindowSize = 8 * MIB  # what 600 Mbit/s with 100 ms have in flight
    carrier_memory: WindowSize = 32 * MIB  # total growth of a carrier's windows, held if visitors do not read

    _check_host = field_validator("host")(lambda value: value if value is None else check_host(value))


class SshSettings(Table):
    """`[ssh]`: the shared port to which hidden servers connect with a plain SSH client."""

    enabled: bool = False  # it needs a port and a permanent key; `tunneld init` enables it
    host: str | None = None  # None: as tunnels.host
    port: Port = 7022
    host_key: Annotated[File | None, RESTART] = None  # None: in the state folder, see backends/ssh/host_key.py
    max_connections: Count = 256  # a descriptor, a task and about 100 KiB each
    reserved_connections: Reserved = 8  # as for control
    max_forwards: Count = 32  # -R per connection: more than fit on a command line
    max_channels: Count = 1000  # visitors at once per connection: ssh needs a descriptor each, of usually 1024
    max_carriers: Count = 16  # connections with the same key, per tunnel
    login_timeout: Seconds = 30.0  # a person types a passphrase; OpenSSH waits for 120 s
    dial_timeout: Seconds = 30.0  # for ssh to reach its server; browsers give up at about that time, TCP after 127 s
    heartbeat: Seconds = 10.0  # as for webmux: a dead connection is closed within three
    patience: Seconds = 2.0  # for an answer, before a new connection replaces an unresponsive one
    max_window: WindowSize = 8 * MIB  # as for webmux
    connection_memory: WindowSize = 32 * MIB
    rekey_octets: Annotated[int, Field(ge=MIB, le=64 * 1024 * MIB)] = (
        32 * 1024 * MIB
    )  # half of the limit of GCM (RFC 4344)
    rekey_interval: Seconds = HOUR  # RFC 4253, section 9

    _check_host = field_validator("host")(lambda value: value if value is None else check_host(value))
    _locate = field_validator("host_key")(absolute_path)


class EgtpSettings(Table):
    """`[egtp]`: the port to which EGTP nodes connect. Messages are encrypted with the relay's own key, not with a
    certificate.
    """

    enabled: bool = False  # it needs a port and a permanent key
    host: str | None = None  # None: as tunnels.host
    port: Port = 7020
    identity: Annotated[File | None, RESTART] = None  # None: in the state folder
    classic: bool = False  # the envelope of 2002, for other nodes; its encryption is broken
    max_carriers: Count = 16  # per tunnel: nodes that serve it, and their restarts
    max_channels: Count = 10_000  # visitors at once per node, as tunnels.max_visitors
    handshake_timeout: Seconds = 10.0  # for the session and the first request, as for the control port
    resume_timeout: Seconds = 15.0  # how long visitors wait for a node that was disconnected
    retransmission: Seconds = 30.0  # a message without an answer is sent again; TCP loses nothing
    heartbeat: Seconds = 10.0  # as for webmux: a dead connection is closed within three
    patience: Seconds = 2.0  # for an answer; after that, visitors go to another node, if there is one
    max_window: WindowSize = 8 * MIB  # as for webmux
    connection_memory: WindowSize = 32 * MIB
    kept_memory: WindowSize = 64 * MIB  # sent and not acknowledged, of all nodes of one owner; each may keep 8 MiB
    max_poll: Seconds = 300.0  # the longest interval between polls: no visitor waits longer, nor what is kept for it
    mail_messages: Count = 1000  # messages between nodes, per credential, and per recipient
    mail_bytes: WindowSize = 16 * MIB  # the same; eight times that for all
    mail_age: Seconds = HOUR  # EGTP gives up a request after an hour at the latest
    mail_rate: VisitorRate = "100/s"  # per credential: what one core passes on takes a few per cent of it

    _check_host = field_validator("host")(lambda value: value if value is None else check_host(value))
    _locate = field_validator("identity")(absolute_path)


class DaemonSettings(Table):
    """`[daemon]`: the process itself."""

    user: Annotated[str, RESTART] = ""  # the account that root changes to; with systemd, the unit sets it
    group: Annotated[str, RESTART] = ""
    drain_timeout: Seconds = 30.0  # for connections to finish after SIGTERM; systemd waits for 90 s
    state: Annotated[Folder | None, RESTART] = None  # None: the default, see places.py
    spin: Annotated[SpinSeconds, RESTART] = 0.0001  # the time that a processor needs to sleep and wake
    watch_backlog: Count = 1000  # events queued for a slow `watch` before it loses some

    _make_absolute = field_validator("state")(absolute_path)


class Settings(Table):
    """A complete tunnel.toml."""

    control: ControlSettings = ControlSettings()
    http: HttpSettings = HttpSettings()
    tunnels: TunnelSettings = TunnelSettings()
    webmux: WebMuxSettings = WebMuxSettings()
    ssh: SshSettings = SshSettings()
    egtp: EgtpSettings = EgtpSettings()
    names: NamesSettings = NamesSettings()
    daemon: DaemonSettings = DaemonSettings()
    log: LogSettings = LogSettings()
    events: EventsSettings = EventsSettings()
    metrics: MetricsSettings = MetricsSettings()
    records: RecordsSettings = RecordsSettings()
    acme: AcmeSettings = AcmeSettings()
    certificate: Annotated[tuple[NamedCertificate, ...], Field(strict=False)] = ()
    credential: Annotated[tuple[Credential, ...], Field(strict=False)] = ()

    @property
    def certificates(self) -> dict[str, TlsFiles]:
        """The certificates of ports, by table."""
        found = {"control.tls": self.control.tls, "http.tls": self.http.tls}
        return {table: files for table, files in found.items() if files is not None}

    @property
    def named_certificates(self) -> dict[str, NamedCertificate]:
        """The certificates for host names, by table."""
        return {f"certificate[{index}]": files for index, files in enumerate(self.certificate)}

    @field_validator("credential")
    @classmethod
    def _check_credentials(cls, value: tuple[Credential, ...], info: ValidationInfo) -> tuple[Credential, ...]:
        """Check the credentials together; each of them is valid by itself."""
        check_unique(value)
        services: list[ControlSettings | HttpSettings | None] = [info.data.get("control"), info.data.get("http")]
        if None not in services and not any(each and each.tls and each.tls.client_ca for each in services):
            for credential in value:
                if credential.certificate is not None:
                    raise ValueError(
                        f"{literal(credential.name)} has a certificate, but no client certificate is requested; set "
                        "control.tls.client_ca or http.tls.client_ca"
                    )
        return value
