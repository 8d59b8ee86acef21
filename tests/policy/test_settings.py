"""One setting is one row: what the configuration, the credentials, openTunnel and the agent have follows the tables."""

from __future__ import annotations

from dataclasses import fields

import pytest

from tunneld.agent.config import OPTION_KEYS
from tunneld.agent.keys import KEYS
from tunneld.cli.tunnel import parser
from tunneld.config.credentials import Credential
from tunneld.policy.access import GRANT_LIMITS, Grant
from tunneld.policy.options import OPTIONS, TunnelOptions


def test_every_option_has_a_row_and_a_field() -> None:
    assert {field.name for field in fields(TunnelOptions)} == set(OPTIONS)


def test_every_limit_of_a_grant_has_a_row_and_is_a_key_of_a_credential() -> None:
    assert {field.name for field in fields(Grant)} - {"name", "role"} == set(GRANT_LIMITS)
    assert set(GRANT_LIMITS) <= set(Credential.model_fields)


@pytest.mark.parametrize("key", [key for key, option in OPTIONS.items() if option.group])
def test_an_option_of_the_agent_is_a_flag_a_key_of_expose_toml_and_is_passed_on(key: str) -> None:
    assert key in KEYS
    assert key in OPTION_KEYS
    values: dict[str, list[str]] = {
        "share": [],
        "allow_from": ["192.0.2.0/24"],
        "deny_from": ["192.0.2.0/24"],
        "host": ["blog"],
        "tls": ["pass"],
        "plain_http": ["allow"],
        "forward_auth": ["https://auth.example/"],
        "bind": ["192.0.2.1"],
    }
    arguments = [OPTIONS[key].flag_of(key), *values.get(key, ["1"])]
    assert getattr(parser().parse_args(["expose", "8000", *arguments]), key)


@pytest.mark.parametrize("key", list(GRANT_LIMITS))
def test_a_limit_of_a_grant_is_a_flag_of_credential_add(key: str) -> None:
    arguments = [f"--{key.replace('_', '-')}", "1"]
    assert getattr(parser().parse_args(["credential", "add", "alice", *arguments]), key)
