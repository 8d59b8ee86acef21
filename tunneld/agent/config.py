"""What the user configured for one exposure, from the options of a command or a table of a file.

Values are looked up by key: `max_pool`. `spell` turns a key into what the user wrote: `--max-pool` or `max_pool`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunneld.agent.defaults import DRAIN_WITHIN, LINGER
from tunneld.agent.health import Check, UnhealthyPolicy
from tunneld.agent.logins import auth_option
from tunneld.agent.pool import PoolLimits
from tunneld.agent.request import TunnelRequest
from tunneld.errors import UsageError
from tunneld.inspector.settings import InspectSettings, inspect_settings
from tunneld.net.endpoint import Target
from tunneld.policy.options import ANY_HOST, MAX_NAME, MAX_TUNNEL_PORTS, OPTIONS

if TYPE_CHECKING:
    from tunneld.config.certificates import AcmeSettings
    from tunneld.tls.identity import Identity

OPTION_KEYS = ("secure", "linger", *(key for key, option in OPTIONS.items() if option.group))
"""Keys that are options of openTunnel. The agent itself acts on `secure` and `linger`; it only passes the others on."""


LOCAL = "local"
"""As `host_header`: the host of the local server, as a browser on this machine would send it."""


@dataclass(frozen=True, slots=True)
class PrivateSettings:
    """What the user configured for one private tunnel."""

    name: str
    admit: tuple[str, ...] = ()  # names of trusted peers, or ids
    identity: Path | None = None  # the file; None: this user's


@dataclass(frozen=True, slots=True)
class ExposureConfig:
    """What the user configured for one exposure. `linger` and `drain_timeout` are seconds, `scheme` is that of the
    address that is shown. With `https`, TLS ends in the agent, which obtains the certificate as these settings say;
    with `private`, visitors are other agents, and TLS is between the two.
    """

    target: Target
    request: TunnelRequest = field(default_factory=TunnelRequest)
    check: Check | None = None
    scheme: str = "tcp"
    linger: float = LINGER
    drain_timeout: float = DRAIN_WITHIN
    https: AcmeSettings | None = None
    private: PrivateSettings | None = None
    inspect: InspectSettings | None = None
    proxy_header: bool = False  # with `https` or `private`: a PROXY header in front of the decrypted bytes


def plan_of(values: Mapping[str, Any], spell: Callable[[str], str]) -> ExposureConfig:
    """Build the configuration of an exposure from values by key; None means not given. Raises `UsageError`."""
    if values["pool"] > values["max_pool"]:
        raise UsageError(f"{spell('pool')} {values['pool']} is more than {spell('max_pool')} {values['max_pool']}")
    if values["share"] and not values["name"]:
        raise UsageError(f"{spell('share')} requires {spell('name')}: agents that give the same name share the tunnel")
    options = {key: values[key] for key in OPTION_KEYS if values[key] not in {None, False}}
    if "name" not in options and (name := _name_of(options.get("host", ""))):
        options["name"] = name
    if auth := auth_option(values["auth"] or (), values["auth_file"], values["name"] or ""):
        options["auth"] = auth
    if options.get("host_header") == LOCAL:
        options["host_header"] = local_host(Target.parse(values["target"]))
    https = _https(values, spell) if values["https_here"] else None
    if https is not None:
        options["tls"] = "pass"
    private = _private(values, options, spell)
    if (count := Target.parse(values["target"]).count) > 1:
        options["port_count"] = _port_count(count, values, spell)
    if values["scheme"] in {"http", "https"} and private is None:
        options["scheme"] = values["scheme"]
    ends_here = https is not None or private is not None
    limits = PoolLimits(values["pool"], values["max_pool"], values["pool_keepalive"], values["pool_max_age"])
    keep_header = values["proxy_protocol"] and not ends_here  # else it is inside of the TLS that ends here
    identity = _egtp_identity(values["identity"]) if values["backend"] == "egtp" else None
    if values["poll"] and identity is None:
        raise UsageError(f"{spell('poll')} is for the backend egtp; add {spell('backend')} egtp")
    request = TunnelRequest(options, limits, keep_header, values["backend"], identity, values["poll"] or 0)
    return ExposureConfig(
        Target.parse(values["target"]),
        request,
        _health_check(values),
        values["scheme"] or "tcp",
        values["linger"],
        values["drain_timeout"],
        https,
        private,
        _inspect(values, spell, passes_tls=not ends_here and _passes_tls(values)),
        bool(values["proxy_protocol"] and ends_here),
    )


def _port_count(count: int, values: Mapping[str, Any], spell: Callable[[str], str]) -> int:
    """The number of public ports for a range of local ones. Raises `UsageError`."""
    if count > MAX_TUNNEL_PORTS:
        raise UsageError(f"{values['target']} has {count} ports; a tunnel has at most {MAX_TUNNEL_PORTS}")
    for key in ("host", "private", "https_here", "health", "inspect"):
        if values[key] not in {None, False}:
            raise UsageError(f"{spell(key)} is for one local server; leave it out, or name one port")
    return count


def _passes_tls(values: Mapping[str, Any]) -> bool:
    """Whether visitors speak TLS with the local server itself."""
    return values["tls"] == "pass" or bool(values["scheme"] == "https" and not values["host"])


def _inspect(values: Mapping[str, Any], spell: Callable[[str], str], *, passes_tls: bool) -> InspectSettings | None:
    """Where the inspector is, or None. Raises `UsageError`."""
    if values["inspect"] is None:
        return None
    here = spell("inspect")
    if passes_tls:
        raise UsageError(
            f"{here} cannot read TLS between visitors and the local server: expose its plain HTTP port instead, and "
            f"let TLS end at the relay ({spell('host')}) or here ({spell('https_here')})"
        )
    if find_spec("h11") is None:
        raise UsageError(f"{here} needs the Python package h11, which is not installed")
    return inspect_settings(values["inspect"], values["inspect_body"], values["inspect_memory"])


def _private(
    values: Mapping[str, Any], options: Mapping[str, Any], spell: Callable[[str], str]
) -> PrivateSettings | None:
    """The settings of a private tunnel, or None. Raises `UsageError`."""
    admit = tuple(values["admit"] or ())
    if not values["private"]:
        for key in ("admit", "identity"):
            if values[key] and not (key == "identity" and values["backend"] == "egtp"):
                raise UsageError(f"{spell(key)} is for private tunnels; add {spell('private')}")
        return None
    here = spell("private")
    if not options.get("name"):
        raise UsageError(f"{here} requires {spell('name')}, by which visitors ask for the tunnel")
    for key in ("host", "client_port", "auth", "auth_file", "https_here"):
        if values[key]:
            raise UsageError(f"{here} has no public address; leave {spell(key)} out")
    return PrivateSettings(str(options["name"]), admit, Path(values["identity"]) if values["identity"] else None)


def _egtp_identity(file: str | Path | None) -> Identity:
    """The key in the file, or one for this exposure alone; the relay is told its id when the tunnel is opened. Raises
    `UsageError` or `ConfigError`.
    """
    from tunneld.tls.identity import Identity  # noqa: PLC0415  # for the few that need it

    if not file:
        return Identity.create()
    from tunneld.config.trust import load_identity  # noqa: PLC0415

    return load_identity(Path(file))


def _name_of(host: str) -> str:
    """The name of a tunnel that asks for one host name of its own: with it, an agent that was killed gets the host name
    again, which the relay still holds for a while. Empty for any other tunnel.
    """
    is_plain = host and host != ANY_HOST and not set(",*/") & set(host) and len(host) <= MAX_NAME
    return host.lower().removesuffix(".") if is_plain else ""


def _https(values: Mapping[str, Any], spell: Callable[[str], str]) -> AcmeSettings:
    """How the agent obtains a certificate. Raises `UsageError`."""
    from tunneld.config.certificates import acme_settings  # noqa: PLC0415 - pydantic, for the few that need it

    here, host = spell("https_here"), values["host"] or ""
    if not host or "," in host or "*" in host or "/" in host:
        raise UsageError(f"{here} requires {spell('host')} with one name, no wildcard and no path")
    if values["allow_from"]:
        raise UsageError(
            f"{here} cannot be combined with {spell('allow_from')}: the authority that issues the certificate connects "
            "from addresses that nothing announces"
        )
    for key in ("auth", "auth_file", "forward_auth", "host_header", "hsts"):
        if values.get(key):
            raise UsageError(f"{spell(key)} requires that TLS ends at the relay; leave {here} out")
    if values["tls"] == "terminate":
        raise UsageError(f"{here} ends TLS in this agent; leave {spell('tls')} out")
    if not values["acme_agree"]:
        raise UsageError(
            f"{here} gets a certificate from {values['acme_directory']}; read the terms of service of that authority "
            f"(Let's Encrypt's are at https://letsencrypt.org/repository/) and accept them with {spell('acme_agree')}"
        )
    if find_spec("acme") is None:
        raise UsageError(f"{here} needs the Python package acme, which is not installed; install tunneld[acme]")
    found = {key: values[f"acme_{key}"] for key in ("directory", "contact", "ca_file") if values[f"acme_{key}"]}
    return acme_settings(found, lambda key: spell(f"acme_{key}"))


def local_host(target: Target) -> str:
    """The host that a local server expects in a request."""
    if target.path:
        return "localhost"
    host = "localhost" if target.host in {"127.0.0.1", "::1"} else target.host
    return f"{host}:{target.port}"


def _health_check(values: Mapping[str, Any]) -> Check | None:
    """The health check that the values ask for, or None."""
    if values["health"] is None:
        return None
    return Check(
        values["health"],
        values["health_path"],
        values["health_interval"],
        values["health_timeout"],
        values["unhealthy_after"],
        values["healthy_after"],
        UnhealthyPolicy(values["unhealthy"]),
    )


UNIQUE_KEYS = ("host", "name", "client_port")
"""Options with which two tunnels of one owner exclude each other. A host is the name, too, where none is given."""


def conflict(configs: Mapping[str, ExposureConfig]) -> str:
    """A sentence about two exposures that cannot both be open at one relay; empty if there are none.

    The second one would replace the first, or take its port, and the first would come back: in turn, for ever. A host
    name, it would not get at all.
    """
    taken: dict[tuple[str, object], str] = {}
    for exposure, config in configs.items():
        for key in UNIQUE_KEYS:
            for value in _unique_values(key, config.request.options.get(key)):
                other = taken.setdefault((key, value), exposure)
                if other != exposure and not _share_tunnel(configs[other], config):
                    hint = ", or set share = true in both" if key == "name" else ""
                    return (
                        f"expose.{other} and expose.{exposure} have the same {key}, {value}: change one of them{hint}"
                    )
    return ""


def _unique_values(key: str, value: object) -> list[object]:
    """What no other tunnel may have. Names of one domain are equal in any spelling; whether a label and a full name are
    the same, only the relay knows.
    """
    if value is None or key != "host":
        return [value] if value is not None else []
    texts = [text.strip() for text in str(value).split(",")]
    return [_normal_host(text) for text in texts if text and text != ANY_HOST]


def _normal_host(text: str) -> str:
    host, slash, path = text.partition("/")
    return host.lower().removesuffix(".") + (slash + path).rstrip("/")


def _share_tunnel(one: ExposureConfig, other: ExposureConfig) -> bool:
    options, others = one.request.options, other.request.options
    return bool(options.get("share") and others.get("share")) and options.get("name") == others.get("name")


@dataclass(frozen=True, slots=True)
class Changes:
    """The difference between two sets of exposures, by name."""

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()


def changes(old: Mapping[str, object], new: Mapping[str, object]) -> Changes:
    """Which names to open, to close, and to close and open again. Names in none of the three are unchanged."""
    return Changes(
        added=tuple(name for name in new if name not in old),
        removed=tuple(name for name in old if name not in new),
        replaced=tuple(name for name in new if name in old and old[name] != new[name]),
    )
