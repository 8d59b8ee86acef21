"""Certificates from a real authority (Pebble), by every challenge."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from tests.support.authority import Authority, http_server, running_authority, tls_server
from tunneld.acme.challenges import ALPN, DnsHook, HttpResponder, TlsAlpnResponder
from tunneld.acme.issuer import Issuer
from tunneld.acme.state import Issued
from tunneld.errors import CertificateError, UsageError


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Authority]:
    with running_authority(tmp_path_factory.mktemp("pebble"), reject_nonces=20) as running:
        yield running


def issuer(authority: Authority, folder: Path, **responders: Any) -> Issuer:
    by_type = {name.replace("_", "-"): each for name, each in responders.items()}
    return Issuer(authority.directory, "", folder / "account.key", by_type, ca_file=authority.ca_file)


def names_of(issued: Issued) -> list[str]:
    leaf = x509.load_pem_x509_certificate(issued.chain)
    assert leaf.public_key() == serialization.load_pem_private_key(issued.key, None).public_key()
    return leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value.get_values_for_type(x509.DNSName)


def test_http_01(authority: Authority, tmp_path: Path) -> None:
    responder = HttpResponder()
    with http_server(authority.http_port, responder.answers):
        issued = issuer(authority, tmp_path, http_01=responder).obtain(["a.example.org", "b.example.org"])
    assert sorted(names_of(issued)) == ["a.example.org", "b.example.org"]
    assert responder.answers == {}
    assert (tmp_path / "account.key").stat().st_mode & 0o777 == 0o600


def test_tls_alpn_01(authority: Authority, tmp_path: Path) -> None:
    responder = TlsAlpnResponder()
    with tls_server(authority.tls_port, lambda name: responder.contexts[name]) as chosen:
        issued = issuer(authority, tmp_path, tls_alpn_01=responder).obtain(["a.example.org"])
    assert names_of(issued) == ["a.example.org"]
    assert set(chosen) == {ALPN}
    assert responder.contexts == {}


def test_dns_01_proves_a_wildcard(authority: Authority, tmp_path: Path) -> None:
    issued = issuer(authority, tmp_path, dns_01=DnsHook(authority.hook)).obtain(["*.t.example.org"])
    assert names_of(issued) == ["*.t.example.org"]


def test_the_account_is_used_again_and_says_when_to_renew(authority: Authority, tmp_path: Path) -> None:
    first = issuer(authority, tmp_path, dns_01=DnsHook(authority.hook))
    issued = first.obtain(["*.t.example.org"])
    again = issuer(authority, tmp_path, dns_01=DnsHook(authority.hook))
    when, ask_again = again.renewal_time(issued.chain)
    assert when is not None
    leaf = x509.load_pem_x509_certificate(issued.chain)
    assert leaf.not_valid_before_utc < when < leaf.not_valid_after_utc
    assert ask_again.tzinfo is not None
    assert names_of(again.obtain(["*.t.example.org"])) == ["*.t.example.org"]


def test_a_name_that_cannot_be_proved_says_why(authority: Authority, tmp_path: Path) -> None:
    with http_server(authority.http_port, {}), pytest.raises(CertificateError, match=r"a\.example\.org: .*\(http-01\)"):
        issuer(authority, tmp_path, http_01=HttpResponder()).obtain(["a.example.org"])
    with pytest.raises(CertificateError, match=r"wildcard needs acme\.dns_hook"):
        issuer(authority, tmp_path, http_01=HttpResponder()).obtain(["*.example.org"])


def test_an_authority_that_does_not_answer(authority: Authority, tmp_path: Path) -> None:
    elsewhere = replace(issuer(authority, tmp_path, http_01=HttpResponder()), directory="https://localhost:1/dir")
    with pytest.raises(CertificateError, match="could not reach the authority"):
        elsewhere.obtain(["a.example.org"])
    with pytest.raises(CertificateError, match="could not reach the authority"):
        replace(issuer(authority, tmp_path), ca_file=None).obtain(["a.example.org"])  # its HTTPS is not verified


def test_a_hook_that_fails_says_what_it_said(tmp_path: Path) -> None:
    script = tmp_path / "hook"
    script.write_text("#!/bin/sh\necho no such zone >&2\nexit 3\n")
    script.chmod(0o755)
    challenge: Any = None
    with pytest.raises(UsageError, match=r"present _acme-challenge\.a\.example failed with status 3: no such zone"):
        DnsHook([str(script)]).present("a.example", challenge, "value")
    DnsHook([str(script)]).remove("a.example", challenge, "value")
    with pytest.raises(UsageError, match=r"could not run .*missing \(acme.dns_hook\): No such file"):
        DnsHook([str(tmp_path / "missing")]).present("a.example", challenge, "value")
    script.write_text("#!/bin/sh\nexec sleep 60\n")
    with pytest.raises(UsageError, match="took more than"):
        DnsHook([str(script)], timeout=0.01).present("a.example", challenge, "value")
