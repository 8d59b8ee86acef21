"""check_reach: the rules of [control] and [http] hold for listeners that were passed in."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.credentials import credential
from tunneld.config import ControlSettings, HttpSettings, Settings, TlsFiles
from tunneld.config.problems import check_reach
from tunneld.errors import ConfigError

WILDCARD = "0.0.0.0"


@pytest.mark.parametrize("service", ["control", "http"])
def test_a_public_listener_is_refused_like_a_configured_host(service: str) -> None:
    check_reach(Settings(), service, "127.0.0.1")
    with pytest.raises(ConfigError, match=f'{service}.open_to_anyone: is false, but host "{WILDCARD}" lets anyone'):
        check_reach(Settings(), service, WILDCARD)
    open_to_anyone = Settings(control=ControlSettings(open_to_anyone=True), http=HttpSettings(open_to_anyone=True))
    check_reach(open_to_anyone, service, WILDCARD)


@pytest.mark.parametrize("service", ["control", "http"])
def test_tls_with_a_credential_suffices(service: str, certificates: Path) -> None:
    tls = TlsFiles(certificate=certificates / "relay.pem", key=certificates / "relay.key")
    settings = Settings(control=ControlSettings(tls=tls), http=HttpSettings(tls=tls))
    with pytest.raises(ConfigError):
        check_reach(settings, service, WILDCARD)
    check_reach(settings.model_copy(update={"credential": (credential("alice"),)}), service, WILDCARD)


@pytest.mark.parametrize("service", ["webmux", "ssh"])
def test_shared_ports_always_require_authentication(service: str) -> None:
    check_reach(Settings(), service, WILDCARD)
