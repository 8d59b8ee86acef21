"""The configuration: tunnel.toml as immutable objects, parsed strictly, dumped completely, compared key by key.

The names in `__all__` are imported on first use (PEP 562): the agent imports modules of this package, too, and does
without pydantic.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tunneld.config.certificates import AcmeSettings, NamedCertificate, TlsFiles
    from tunneld.config.credentials import Credential, make_verifier
    from tunneld.config.file import dump, load
    from tunneld.config.http import HttpSettings
    from tunneld.config.keys import Change, diff, reloaded
    from tunneld.config.places import find_config
    from tunneld.config.reporting import LogSettings
    from tunneld.config.schema import ControlSettings, DaemonSettings, Settings, TunnelSettings

__all__ = [
    "AcmeSettings",
    "Change",
    "ControlSettings",
    "Credential",
    "DaemonSettings",
    "HttpSettings",
    "LogSettings",
    "NamedCertificate",
    "Settings",
    "TlsFiles",
    "TunnelSettings",
    "diff",
    "dump",
    "find_config",
    "load",
    "make_verifier",
    "reloaded",
]

_MODULES = {
    "certificates": ("AcmeSettings", "NamedCertificate", "TlsFiles"),
    "credentials": ("Credential", "make_verifier"),
    "file": ("dump", "load"),
    "http": ("HttpSettings",),
    "keys": ("Change", "diff", "reloaded"),
    "places": ("find_config",),
    "reporting": ("LogSettings",),
    "schema": ("ControlSettings", "DaemonSettings", "Settings", "TunnelSettings"),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            value = getattr(import_module(f"tunneld.config.{module}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'tunneld.config' has no attribute {name!r}")
