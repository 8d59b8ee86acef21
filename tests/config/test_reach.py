"""A face whose listener comes from elsewhere is held to what its table says."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.credentials import credential
from tunneld.config import ControlSettings, HttpSettings, Settings, TlsFiles
from tunneld.config.reach import check_reach
from tunneld.errors import ConfigError

EVERYWHERE = "0.0.0.0"


@pytest.mark.parametrize("face", ["control", "http"])
def test_strangers_are_kept_out_as_if_the_host_were_configured(face: str) -> None:
    check_reach(Settings(), face, "127.0.0.1")
    with pytest.raises(ConfigError, match=f'{face}.open_to_anyone: is false, but host "{EVERYWHERE}" lets strangers'):
        check_reach(Settings(), face, EVERYWHERE)
    open_to_anyone = Settings(control=ControlSettings(open_to_anyone=True), http=HttpSettings(open_to_anyone=True))
    check_reach(open_to_anyone, face, EVERYWHERE)


@pytest.mark.parametrize("face", ["control", "http"])
def test_tls_and_a_credential_are_enough(face: str, certificates: Path) -> None:
    tls = TlsFiles(certificate=certificates / "relay.pem", key=certificates / "relay.key")
    settings = Settings(control=ControlSettings(tls=tls), http=HttpSettings(tls=tls))
    with pytest.raises(ConfigError):
        check_reach(settings, face, EVERYWHERE)
    check_reach(settings.model_copy(update={"credential": (credential("alice"),)}), face, EVERYWHERE)


@pytest.mark.parametrize("face", ["webmux", "ssh"])
def test_shared_ports_ask_everybody_who_they_are(face: str) -> None:
    check_reach(Settings(), face, EVERYWHERE)
