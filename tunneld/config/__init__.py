"""The configuration: tunnel.toml as immutable objects, parsed strictly, dumped completely, compared key by key."""

from tunneld.config.certificates import AcmeSettings, NamedCertificate, TlsFiles
from tunneld.config.credentials import Credential, make_verifier
from tunneld.config.file import dump, load
from tunneld.config.keys import Change, diff, reloaded
from tunneld.config.places import find_config
from tunneld.config.schema import (
    ControlSettings,
    DaemonSettings,
    HttpSettings,
    LogSettings,
    Settings,
    TunnelSettings,
)

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
