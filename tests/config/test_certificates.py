"""The tables `[acme]` and `[[certificate]]`."""

from __future__ import annotations

from pathlib import Path

import pytest
import trustme

from tunneld.config import Settings, diff, load
from tunneld.config.certificates import AcmeSettings, name_server
from tunneld.config.permissions import config_files
from tunneld.errors import ConfigError
from tunneld.policy.rates import Rate

ENABLED = "[acme]\nenabled = true\nagree = true\n"
UPDATE = '[acme.rfc2136]\nserver = "192.0.2.53"\nkey_name = "tunneld."\nkey_secret_file = "tsig.key"\n'


def config(folder: Path, text: str) -> Path:
    made = trustme.CA().issue_cert("blog.example.org")
    made.private_key_pem.write_to_path(folder / "blog.key")
    made.cert_chain_pems[0].write_to_path(folder / "blog.pem")
    (folder / "tsig.key").write_text("c2VjcmV0\n")
    path = folder / "tunnel.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[acme]\nenabled = true\n", r"acme\.agree: is false, but enabled is true; read the terms of service"),
        (ENABLED + 'directory = "http://ca/dir"\n', r'acme\.directory: "http://ca/dir" is not an https:// URL'),
        (ENABLED + 'contact = "ops"\n', r'acme\.contact: "ops" is not an e-mail address'),
        (ENABLED + 'max_orders = "20/year"\n', r'acme\.max_orders: "20/year" is not a rate'),
        (ENABLED + "renew_left = 1.0\n", r"acme\.renew_left: 1\.0 is not between 0\.05 and 0\.9"),
        (ENABLED + 'dns_hook = ["hook"]\n' + UPDATE, r"acme\.rfc2136: is set, but dns_hook is, too"),
        (ENABLED + UPDATE.replace("192.0.2.53", "a:b:c"), r'acme\.rfc2136\.server: "a:b:c" is not HOST or HOST:PORT'),
        (ENABLED + UPDATE.replace("tsig.key", "none"), r"acme\.rfc2136\.key_secret_file: could not read"),
        ('[[certificate]]\ncertificate = "blog.pem"\nkey = "none.key"\n', r"certificate\[0\]\.key: could not read"),
        ('[[certificate]]\ncertificate = "blog.pem"\nkey = "tsig.key"\n', r"certificate\[0\]: could not load"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        load(config(tmp_path, text))


def test_a_package_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunneld.config.certificates.find_spec", lambda _: None)
    with pytest.raises(ConfigError) as refused:
        load(config(tmp_path, ENABLED + UPDATE))
    assert [problem.partition("tunnel.toml: ")[2] for problem in refused.value.problems] == [
        "acme.enabled: is true, but the Python package acme is not installed; install tunneld[acme]",
        "acme.rfc2136: needs the Python package dnspython, which is not installed; install tunneld[dns]",
    ]


def test_a_wildcard_needs_a_way_to_prove_dns(tmp_path: Path) -> None:
    assert not AcmeSettings().proves_dns
    assert AcmeSettings(dns_hook=("hook",)).proves_dns
    assert load(config(tmp_path, ENABLED + UPDATE)).acme.proves_dns


def test_limits_may_be_per_week() -> None:
    assert AcmeSettings().owner_rate == Rate(20, 7 * 86400)
    assert str(AcmeSettings(max_orders="50/day").order_rate) == "50/day"


def test_files_are_watched_like_other_files_and_named_in_changes(tmp_path: Path) -> None:
    path = config(tmp_path, ENABLED + UPDATE + '[[certificate]]\ncertificate = "blog.pem"\nkey = "blog.key"\n')
    settings = load(path)
    assert [key for key, _ in config_files(settings, None)] == [
        "certificate[0].certificate",
        "certificate[0].key",
        "acme.rfc2136.key_secret_file",
    ]
    changes = [str(change) for change in diff(settings, Settings()) if change.key.startswith("certificate")]
    assert changes == [f'certificate.{tmp_path}/blog.pem: "{tmp_path}/blog.key" -> nothing']


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("192.0.2.53", ("192.0.2.53", 53)),
        ("ns.example.org:5353", ("ns.example.org", 5353)),
        ("2001:db8::53", ("2001:db8::53", 53)),
        ("[2001:db8::53]:5353", ("2001:db8::53", 5353)),
    ],
)
def test_addresses_of_name_servers(text: str, expected: tuple[str, int]) -> None:
    assert name_server(text) == expected
