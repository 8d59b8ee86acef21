"""Hypothesis strategies for complete configurations, within the bounds of the schema."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hypothesis import assume
from hypothesis import strategies as st

from tunneld.config import (
    ControlSettings,
    Credential,
    DaemonSettings,
    HttpSettings,
    LogSettings,
    Settings,
    TlsFiles,
    TunnelSettings,
)
from tunneld.config.ports import collisions
from tunneld.net.endpoint import is_loopback
from tunneld.wire.verifier import MAX_ITERATIONS, MIN_ITERATIONS, Verifier

SECONDS = st.one_of(
    st.floats(0.001, 365 * 24 * 3600, allow_nan=False), st.sampled_from([0.001, 1.0, 365 * 24 * 3600.0])
)
COUNTS = st.integers(1, 1_000_000)
PORTS = st.integers(0, 65535)
NAMES = st.one_of(
    st.from_regex(r"[a-z0-9_]([a-z0-9_.-]{0,20}[a-z0-9_])?", fullmatch=True).filter(
        lambda name: not name.replace(".", "").isdigit()
    ),
    st.ip_addresses(v=4).map(str),
    st.ip_addresses(v=6).map(str),
)
WILDCARDS = {"", "0.0.0.0", "::"}
HOSTS = st.one_of(NAMES, st.sampled_from(sorted(WILDCARDS | {"127.0.0.1", "localhost", "::1"})))


@st.composite
def port_ranges(draw: st.DrawFn) -> str:
    """`FIRST-LAST`, a single port, or 0."""
    first = draw(st.integers(1, 65535))
    return draw(st.sampled_from([f"{first}-{draw(st.integers(first, min(first + 1000, 65535)))}", str(first), "0"]))


@st.composite
def startups(draw: st.DrawFn) -> str:
    """A valid `START:RATE:FULL`."""
    start = draw(COUNTS)
    return f"{start}:{draw(st.integers(1, 100))}:{draw(st.integers(start, 1_000_000))}"


def tls_tables(folder: Path) -> st.SearchStrategy[TlsFiles | None]:
    """No TLS, or certificates from the folder of the fixture `certificates`."""
    prefixes = st.sampled_from(["", "it's #1 \\ "])
    authority = st.one_of(st.none(), prefixes.map(lambda prefix: folder / f"{prefix}clients.pem"))
    pair = prefixes.map(lambda prefix: (folder / f"{prefix}relay.pem", folder / f"{prefix}relay.key"))
    return st.one_of(
        st.none(), st.builds(lambda two, ca: TlsFiles(certificate=two[0], key=two[1], client_ca=ca), pair, authority)
    )


def optional_tuples(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """None, or a tuple of one to three."""
    return st.one_of(st.none(), st.lists(values, min_size=1, max_size=3).map(tuple))


VERIFIERS = st.builds(
    Verifier,
    st.integers(MIN_ITERATIONS, MAX_ITERATIONS),
    st.binary(min_size=1, max_size=40),
    st.binary(min_size=32, max_size=32),
    st.binary(min_size=32, max_size=32),
)
NETWORKS = optional_tuples(st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)).map(str))


@st.composite
def credentials(draw: st.DrawFn) -> tuple[Credential, ...]:
    """Up to three credentials with different names, with verifiers in the file."""
    names = draw(st.lists(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,9}", fullmatch=True), max_size=3, unique=True))
    return tuple(
        Credential(
            name=name,
            role=draw(st.sampled_from(["user", "viewer", "admin"])),
            verifier=draw(VERIFIERS),
            backends=draw(optional_tuples(st.sampled_from(["tcp", "webmux"]))),
            ports=draw(optional_tuples(port_ranges().filter(lambda ports: ports != "0"))),
            bind=draw(NETWORKS),
            networks=draw(NETWORKS),
            server_from=draw(NETWORKS),
            **_all(draw, st.one_of(st.none(), COUNTS), "max_tunnels", "max_visitors"),
            max_ttl=draw(st.one_of(st.none(), SECONDS)),
        )
        for name in names
    )


@st.composite
def settings(draw: st.DrawFn, folder: Path) -> Settings:
    """Any valid configuration."""
    made = Settings(
        control=_control(draw, folder),
        http=_http(draw),
        tunnels=TunnelSettings(
            host=draw(HOSTS),
            advertised_host=draw(st.one_of(st.just(""), NAMES.filter(lambda name: name not in WILDCARDS))),
            ports=draw(port_ranges()),
            **_all(draw, COUNTS, "max_tunnels", "max_visitors", "max_parked", "max_waiting"),
            **_all(draw, COUNTS, "max_reservations", "max_reservations_per_owner"),
            reservation=draw(st.one_of(st.just(0.0), SECONDS)),
            **_all(draw, SECONDS, "pairing_timeout", "open_timeout", "linger", "accept_backoff", "keepalive"),
            **_visitors(draw),
        ),
        daemon=DaemonSettings(
            user=draw(st.sampled_from(["", "nobody"])),
            group=draw(st.sampled_from(["", "nogroup"])),
            drain_timeout=draw(SECONDS),
            watch_backlog=draw(COUNTS),
            spin=draw(st.floats(0, 0.01)),
            state=draw(st.sampled_from([None, folder / "state"])),
        ),
        credential=draw(credentials()),
        log=LogSettings(
            format=draw(st.sampled_from(["auto", "human", "json"])),
            level=draw(st.sampled_from(["debug", "info", "warning", "error"])),
        ),
    )
    assume(not list(collisions(made)))
    return made


def _visitors(draw: st.DrawFn) -> dict[str, Any]:
    networks = st.lists(st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)).map(str), max_size=3).map(tuple)
    return {
        **_all(draw, networks, "allow_from", "deny_from", "trusted_proxies"),
        "max_per_source": draw(st.one_of(st.none(), COUNTS)),
        "visitor_rate": draw(st.one_of(st.none(), COUNTS.map(str), COUNTS.map("{}/m".format))),
        "max_sources": draw(COUNTS),
        "proxy_header_timeout": draw(SECONDS),
    }


def _control(draw: st.DrawFn, folder: Path) -> ControlSettings:
    host, tls = draw(HOSTS), draw(tls_tables(folder))
    is_protected = is_loopback(host) or (tls is not None and tls.client_ca is not None)
    return ControlSettings(
        host=host,
        port=draw(PORTS),
        tls=tls,
        open_to_anyone=draw(st.booleans()) or not is_protected,
        max_startups=draw(startups()),
        **_all(draw, COUNTS, "max_connections", "max_startups_per_source", "kept_places"),
        **_all(
            draw,
            SECONDS,
            "handshake_timeout",
            "idle_timeout",
            "write_timeout",
            "penalty",
            "max_penalty",
            "known_address_time",
        ),
        abandoned_handshakes=draw(st.sampled_from(["1/s", "30/m", "7/h"])),
    )


def _http(draw: st.DrawFn) -> HttpSettings:
    host, enabled = draw(HOSTS), draw(st.booleans())
    return HttpSettings(
        enabled=enabled,
        host=host,
        port=draw(PORTS),
        open_to_anyone=draw(st.booleans()) or (enabled and not is_loopback(host)),
        allowed_hosts=tuple(draw(st.lists(NAMES, max_size=3))),
        max_body=draw(st.integers(1024, 1024 * 1024)),
        **_all(draw, SECONDS, "read_timeout", "keep_alive_timeout"),
    )


def _all(draw: st.DrawFn, values: st.SearchStrategy[Any], *names: str) -> dict[str, Any]:
    return {name: draw(values) for name in names}
