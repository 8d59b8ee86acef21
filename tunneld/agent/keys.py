"""The settings of an exposure and of its relay: every flag of `tunnel expose`, and every key of expose.toml.

One row is one setting. The command line makes its flags from the rows (cli/expose_options.py), expose_file.py checks a
file with them. Needs neither pydantic nor Trio.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from tunneld.agent.defaults import (
    CHECK_INTERVAL,
    CHECK_PATH,
    CHECK_TIMEOUT,
    DRAIN_WITHIN,
    HEALTHY_AFTER,
    LARGEST_POOL,
    LETS_ENCRYPT,
    LINGER,
    MAX_CHECKS,
    MAX_POLL,
    MAX_POOL,
    MIN_POOL,
    PARKED_KEEPALIVE,
    PARKED_MAX_AGE,
    UNHEALTHY_AFTER,
)
from tunneld.agent.kinds import (
    MILLISECOND,
    Boolean,
    Kind,
    Number,
    ReadableFile,
    Several,
    Switch,
    Text,
    Words,
    parse_any,
    parse_network_text,
    parse_request_path,
)
from tunneld.inspector.settings import (
    INSPECT_BODY,
    INSPECT_MEMORY,
    INSPECT_PLACE,
    parse_inspect,
    parse_kept_body,
    parse_kept_memory,
)
from tunneld.net.endpoint import MAX_PORT, Target, parse_relay
from tunneld.policy.networks import parse_networks
from tunneld.policy.options import (
    MAX_COUNT,
    NAMES,
    OPTIONS,
    TUNNEL,
    Option,
    parse_boolean,
    parse_client_port,
    parse_count,
    parse_seconds,
)
from tunneld.policy.private import parse_peer
from tunneld.policy.rates import Rate
from tunneld.policy.units import YEAR, parse_positive_seconds, parse_seconds_or_zero

HEALTH, PRIVATE, INSPECTOR = "health", "private", "inspector"
"""The groups of the flags that the agent alone acts on; the other groups are those of `OPTIONS`."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting: the kind of its values, what it does, the group of its flag ("" if it has none of its own), its
    default, and what the help says that it takes. The flag is the key with dashes, unless another one is given.
    """

    kind: Kind
    summary: str = ""
    group: str = ""
    default: Any = None
    takes: str = ""
    flag: str = ""


def _option(option: Option) -> Setting:
    """The row of an option of openTunnel."""
    kind = _OPTION_KINDS.get(option.read) or Text(option.read)
    is_flag = isinstance(kind, Boolean)
    return Setting(kind, option.summary, option.group, False if is_flag else None, option.takes, option.flag)


def _typed(read: Callable[[str], Any]) -> Callable[[str], str]:
    """Check the text of a flag with `read`, and keep it as it was typed."""
    return partial(Text.from_text, Text(read))


_OPTION_KINDS: dict[Callable[[str], Any], Kind] = {
    parse_boolean: Boolean(),
    parse_client_port: Number(1, MAX_PORT, _typed(parse_client_port), whole=True),
    parse_count: Number(1, MAX_COUNT, _typed(parse_count), whole=True),
    parse_networks: Several(Text(parse_network_text, normal=str), parse_networks),
    parse_seconds: Number(MILLISECOND, YEAR, _typed(parse_seconds)),
    Rate.parse: Text(Rate.parse, normal=str),
}
"""The kinds of the options that are not texts in a file, by the function that reads their text."""
_SECONDS = Number(MILLISECOND, YEAR, parse_positive_seconds)
_SECONDS_OR_ZERO = Number(0, YEAR, parse_seconds_or_zero)
_POOL_SIZE = Number(1, LARGEST_POOL, partial(parse_count, maximum=LARGEST_POOL), whole=True)
_CHECKS = Number(1, MAX_CHECKS, partial(parse_count, maximum=MAX_CHECKS), whole=True)
_WHOLE = "(default: %(default)s)"
_FLOAT = "(default: %(default)g)"

KEYS: Mapping[str, Setting] = {
    "target": Setting(
        Text(Target.parse, numbers=True),
        "the local server: PORT (or a range, 5000-5010), HOST:PORT or unix:PATH; for expose also a folder",
    ),
    "scheme": Setting(Words(("tcp", "http", "https")), default="tcp"),
    **{key: _option(option) for key, option in OPTIONS.items() if option.group},
    "linger": Setting(
        _SECONDS,
        f"how long a connection may be idle after one direction has ended {_FLOAT}",
        TUNNEL,
        LINGER,
        "SECONDS",
    ),
    "drain_timeout": Setting(
        _SECONDS_OR_ZERO,
        f"how long visitors may finish after a signal to stop {_FLOAT}",
        TUNNEL,
        DRAIN_WITHIN,
        "SECONDS",
    ),
    "backend": Setting(
        Words(("webmux", "tcp", "egtp")),
        "one connection to the relay for all visitors (webmux), the same with messages between two keys (egtp), "
        "or one for each (tcp); default: webmux if the relay and this system support it",
        TUNNEL,
    ),
    "poll": Setting(
        Number(1, MAX_POLL, partial(parse_count, maximum=MAX_POLL), whole=True),
        "with egtp, hold no connection: connect this often, and while visitors send or receive",
        TUNNEL,
        takes="SECONDS",
    ),
    "secure": Setting(
        Words(("yes", "key", "no")),
        "protection of tcp connections: TLS and a key (yes), only a key (key) or none (no); "
        "default: yes if the control connection uses TLS, else key, or no if the relay is on this machine",
        TUNNEL,
    ),
    "pool": Setting(
        _POOL_SIZE, f"idle connections to keep with tcp when there is no load {_WHOLE}", TUNNEL, MIN_POOL, "COUNT"
    ),
    "max_pool": Setting(
        _POOL_SIZE, f"idle connections to keep with tcp under load {_WHOLE}", TUNNEL, MAX_POOL, "COUNT"
    ),
    "pool_keepalive": Setting(
        _SECONDS,
        f"with tcp, probe the relay when an idle connection has been silent for this long {_FLOAT}",
        TUNNEL,
        PARKED_KEEPALIVE,
        "SECONDS",
    ),
    "pool_max_age": Setting(
        _SECONDS,
        f"with tcp, replace an idle connection after this time {_FLOAT}",
        TUNNEL,
        PARKED_MAX_AGE,
        "SECONDS",
    ),
    "proxy_protocol": Setting(
        Boolean(),
        "send the visitor's address to the local server in a PROXY protocol header, version 2",
        TUNNEL,
        default=False,
    ),
    "auth": Setting(
        Several(Text(parse_any)),
        "let in visitors with this user name and password; repeat for more; link: only visitors with a link of "
        "`tunnel share`. Other users of this machine can see it: prefer --auth-file",
        NAMES,
        takes="USER:PASSWORD",
    ),
    "auth_file": Setting(
        ReadableFile(), "file with lines USER:PASSWORD, for visitors of host names", NAMES, takes="FILE"
    ),
    "https_here": Setting(
        Boolean(),
        "end TLS in this agent, which gets the certificate itself: its key never leaves this machine",
        NAMES,
        default=False,
    ),
    "acme_directory": Setting(
        Text(parse_any),
        "authority that issues the certificate of --https-here (default: Let's Encrypt)",
        NAMES,
        LETS_ENCRYPT,
        "URL",
    ),
    "acme_ca_file": Setting(
        ReadableFile(), "trust the certificate authorities in this file for that URL", NAMES, takes="FILE"
    ),
    "acme_agree": Setting(
        Boolean(), "agree to the terms of service of that authority (required)", NAMES, default=False
    ),
    "acme_contact": Setting(
        Text(parse_any), "e-mail address for the authority (default: none)", NAMES, takes="ADDRESS"
    ),
    "private": Setting(
        Boolean(),
        "no public address: only peers that this agent admits reach it, with `tunnel visit`, and the relay cannot read "
        "what is sent; requires --name",
        PRIVATE,
        default=False,
    ),
    "admit": Setting(
        Several(Text(parse_peer)),
        "let in this peer: its name in `tunnel trust list`, or its id; repeat for more; any: all that are trusted",
        PRIVATE,
        takes="PEER",
    ),
    "identity": Setting(
        ReadableFile(), "private key to use instead of that of `tunnel identity`, or with egtp", PRIVATE, takes="FILE"
    ),
    "inspect": Setting(
        Switch(parse_inspect),
        f"show requests and responses on a page, see INSPECTOR in tunnel(1) (default: {INSPECT_PLACE})",
        INSPECTOR,
        takes="ADDRESS:PORT",
    ),
    "inspect_body": Setting(
        Text(parse_kept_body, numbers=True),
        f"bytes kept of each body {_WHOLE}",
        INSPECTOR,
        INSPECT_BODY,
        "BYTES[k|M]",
    ),
    "inspect_memory": Setting(
        Text(parse_kept_memory, numbers=True),
        f"bytes kept of all requests together, then the oldest is dropped {_WHOLE}",
        INSPECTOR,
        INSPECT_MEMORY,
        "BYTES[k|M|G]",
    ),
    "health": Setting(
        Words(("tcp", "http")),
        "check that the local server accepts a connection (tcp) or answers a GET request (http)",
        HEALTH,
    ),
    "health_path": Setting(
        Text(parse_request_path), f"path to request with --health http {_WHOLE}", HEALTH, CHECK_PATH, "PATH"
    ),
    "health_interval": Setting(_SECONDS, f"time between checks {_FLOAT}", HEALTH, CHECK_INTERVAL, "SECONDS"),
    "health_timeout": Setting(_SECONDS, f"time limit for a check {_FLOAT}", HEALTH, CHECK_TIMEOUT, "SECONDS"),
    "unhealthy_after": Setting(
        _CHECKS, f"failed checks in a row after which it is unhealthy {_WHOLE}", HEALTH, UNHEALTHY_AFTER, "COUNT"
    ),
    "healthy_after": Setting(
        _CHECKS,
        f"successful checks in a row after which it is healthy again {_WHOLE}",
        HEALTH,
        HEALTHY_AFTER,
        "COUNT",
    ),
    "unhealthy": Setting(
        Words(("answer", "withdraw", "tell")),
        "while unhealthy, answer visitors with status 503 or disconnect them (answer), serve them as usual and "
        "report the failure (tell), or leave them to other agents of the tunnel (withdraw); default: %(default)s",
        HEALTH,
        "answer",
    ),
}
"""The settings of an exposure."""


def _pins(text: str) -> object:
    from tunneld.tls.pins import parse_pins  # noqa: PLC0415 - --help does without ssl

    return parse_pins(text)


RELAY_KEYS: Mapping[str, Kind] = {
    "where": Text(parse_relay),
    "ca": ReadableFile(),
    "pin": Text(_pins, normal=str),
    "insecure": Boolean(),
    "cert": ReadableFile(),
    "key": ReadableFile(),
    "credential": Text(parse_any),
    "secret_file": ReadableFile(),
    "timeout": _SECONDS,
}
"""The settings of the relay, in the table `[relay]`."""
