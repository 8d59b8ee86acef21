"""The tables `[http]` and `[http.page]`: the HTTP interface and the web page of the relay."""

from __future__ import annotations

from pydantic import ValidationInfo, field_validator

from tunneld.config.certificates import TlsFiles
from tunneld.config.values import (
    HOUR,
    KIB,
    BodySize,
    Count,
    Loading,
    Names,
    Port,
    Reserved,
    Seconds,
    Table,
    ValidatedBool,
    check_host,
)
from tunneld.config.wording import literal
from tunneld.net.endpoint import is_loopback


class PageSettings(Table):
    """`[http.page]`: the web page of the relay, at `/` of the HTTP port.

    A session is one login in one browser. A stream is the connection over which a visible page is kept up to date; a
    page in a hidden tab has none.
    """

    enabled: bool = True  # it is as reachable as the rest of the port, which is on loopback without credentials
    session_timeout: Seconds = 12 * HOUR  # a working day, then one logs in again
    idle_timeout: Seconds = HOUR  # without a visible page: a machine that was left alone
    max_sessions: Count = 256  # 1 KiB each
    max_sessions_per_credential: Count = 8  # browsers and machines of one person
    max_streams: Count = 64  # a quarter of http.max_connections, each of which lasts
    max_streams_per_credential: Count = 8  # screens of one person
    interval: Seconds = 2.0  # people read no faster; each snapshot of 256 tunnels costs some 20 ms


class HttpSettings(Table):
    """`[http]`: the web page, XML-RPC, JSON, health and metrics."""

    enabled: bool = True
    host: str = "127.0.0.1"
    port: Port = 7011
    tls: TlsFiles | None = None
    page: PageSettings = PageSettings()
    open_to_anyone: ValidatedBool = False
    allowed_hosts: Names = ()  # in addition to the names of loopback: pages of other sites must not reach the relay
    max_connections: Count = 256  # each costs a descriptor and one or two tasks, as for control.max_connections
    reserved_connections: Reserved = 8  # a health probe and a monitoring system, twice each, and operators
    max_body: BodySize = 64 * KIB  # the largest legitimate request is below 1 KiB
    read_timeout: Seconds = 10.0  # 64 KiB over a modem
    keep_alive_timeout: Seconds = 30.0
    write_timeout: Seconds = 30.0  # a peer that reads nothing for so long is gone

    _check_host = field_validator("host")(check_host)

    @field_validator("open_to_anyone")
    @classmethod
    def _check_exposure(cls, value: bool, info: ValidationInfo) -> bool:
        listens = info.data.get("enabled", False) and {"host", "tls"} <= info.data.keys()
        if not listens or value or is_loopback(info.data["host"]):
            return value
        tls: TlsFiles | None = info.data["tls"]
        credentials = isinstance(info.context, Loading) and info.context.credentials
        if tls is not None and (credentials or tls.client_ca is not None):
            return value
        raise ValueError(
            f"is false, but host {literal(info.data['host'])} lets anyone open tunnels or read secrets on the network; "
            "add a [[credential]] and [http.tls], listen on loopback behind a proxy that authenticates, or set "
            "open_to_anyone = true behind a firewall"
        )
