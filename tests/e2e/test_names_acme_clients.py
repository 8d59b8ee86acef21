"""Caddy and certbot as local servers' own ACME clients: they get their certificates through the relay, from Pebble.

             tls-alpn-01 ──► names.https ──► tls=pass ──► Caddy
Pebble ──►
             http-01 ──► names.http ──► blog/.well-known/acme-challenge ──► certbot
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from tests.e2e.test_names_tls import NAME, agent, curl, relay_with_names
from tests.e2e.test_web import NGINX
from tests.support.authority import Authority, running_authority
from tests.support.programs import free_port, listening, run

Find = Callable[[str], str]

CADDYFILE = """
{{
    admin off
    storage file_system {folder}/caddy
    auto_https disable_redirects
    https_port {port}
    default_bind 127.0.0.1
    cert_issuer acme {{
        dir {directory}
        trusted_roots {ca_file}
        disable_http_challenge
    }}
}}
{name}:{port} {{
    respond "a page of Caddy"
}}
"""


def visit(find: Find, folder: Path, authority: Authority, https: int, *words: str) -> list[str]:
    """A visitor that trusts nothing but what the authority has issued."""
    authority.write_roots(folder / "roots.pem")
    return curl(find, NAME, https, "--cacert", str(folder / "roots.pem"), *words, f"https://{NAME}:{https}/page")


async def test_caddy_gets_its_certificate_through_a_name_whose_tls_is_passed_on(
    tmp_path: Path, program_path: Find
) -> None:
    caddy = program_path("caddy")
    with running_authority(tmp_path / "pebble", retry_after=0) as authority:  # Caddy 2.6 does not understand a date
        port, config = await free_port(), tmp_path / "Caddyfile"
        home = os.environ | {"HOME": str(tmp_path)}
        facts = {"directory": authority.directory, "ca_file": authority.ca_file}
        config.write_text(CADDYFILE.format(folder=tmp_path, port=port, name=NAME, **facts))
        async with (
            relay_with_names(tmp_path, authority.tls_port) as (relay, _http, https),
            agent(relay, port, "--tls", "pass"),
            listening([caddy, "run", "--config", str(config), "--adapter", "caddyfile"], port, env=home),
        ):
            retry = ["--retry", "40", "--retry-all-errors", "--retry-delay", "1", "--http2", "-w", " %{http_version}"]
            said = await run(visit(program_path, tmp_path, authority, https, *retry))
            assert said == "a page of Caddy 2"
        assert list((tmp_path / "caddy").rglob(f"{NAME}.key"))


async def test_certbot_gets_a_certificate_for_a_server_whose_tls_is_passed_on(
    tmp_path: Path, program_path: Find
) -> None:
    """The HTTP port leads all paths of the name to HTTPS, but for the one of the challenge, which has a tunnel."""
    certbot = program_path("certbot")
    with running_authority(tmp_path / "pebble") as authority:
        port, challenge_port = await free_port(), await free_port()
        async with relay_with_names(tmp_path, authority.tls_port, http=authority.http_port) as (relay, _, https):
            challenge = ["--host", "blog/.well-known/acme-challenge", "--plain-http", "allow", "--name", "challenge"]
            async with agent(relay, challenge_port, *challenge), agent(relay, port, "--tls", "pass"):
                order = [certbot, "certonly", "--standalone", "--http-01-port", str(challenge_port), "-d", NAME]
                order += ["--http-01-address", "127.0.0.1", "--server", authority.directory, "--non-interactive"]
                order += ["--agree-tos", "--register-unsafely-without-email"]
                for kind in ("config", "work", "logs"):
                    order += [f"--{kind}-dir", f"{tmp_path}/certbot/{kind}"]
                await run(order, env=os.environ | {"REQUESTS_CA_BUNDLE": str(authority.ca_file)})
                live = tmp_path / "certbot/config/live" / NAME
                certificate = f"ssl_certificate {live}/fullchain.pem; ssl_certificate_key {live}/privkey.pem;"
                (tmp_path / "www").mkdir()
                (tmp_path / "www" / "page").write_text("a page of nginx")
                config = tmp_path / "nginx.conf"
                config.write_text(NGINX.format(folder=tmp_path, port=port, words="ssl", more=certificate))
                async with listening([program_path("nginx"), "-c", str(config)], port):
                    assert await run(visit(program_path, tmp_path, authority, https)) == "a page of nginx"
