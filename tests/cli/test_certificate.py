"""`tunneld certificate`, with and without a running relay, and the certificates of host names, from Pebble."""

from __future__ import annotations

import json
import os
import ssl
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from tests.support.authority import Authority, running_authority
from tests.support.peers import PATIENCE
from tests.support.programs import daemon, lasting_port
from tunneld.client import connect

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="host names need the pump")


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Authority]:
    with running_authority(tmp_path_factory.mktemp("pebble")) as running:
        yield running


def words(authority: Authority, more: str = "") -> str:
    """Settings for host names on the ports at which the authority validates."""
    return (
        f'[names]\ndomain = "t.example.org"\nhttp = "127.0.0.1:{authority.http_port}"\n'
        f'https = "127.0.0.1:{authority.tls_port}"\n'
        f'[acme]\nenabled = true\nagree = true\ndirectory = "{authority.directory}"\nca_file = "{authority.ca_file}"\n'
        f"{more}"
    )


def stopped_relay(folder: Path, authority: Authority, more: str = "") -> Path:
    """A configuration of a relay that does not run."""
    config = folder / "tunnel.toml"
    config.write_text(
        f"[control]\nport = {lasting_port()}\n"
        f'[tunnels]\nports = "0"\n[daemon]\nstate = "state"\n{words(authority, more)}'
    )
    return config


async def certificate(config: Path, *arguments: str) -> tuple[int, list[str], str]:
    """Run the command; returns its status, the lines of its output, and what it said besides."""
    command = [sys.executable, "-m", "tunneld", "--config", str(config), "certificate", *arguments]
    with trio.fail_after(PATIENCE * 3):
        done = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False)
    said = done.stderr.decode()
    assert "Traceback" not in said
    return done.returncode, done.stdout.decode().splitlines(), said


async def test_without_a_relay_the_command_answers_challenges_itself(authority: Authority, tmp_path: Path) -> None:
    config = stopped_relay(tmp_path, authority)
    assert await certificate(config, "list") == (os.EX_OK, [], "")
    status, lines, said = await certificate(config, "try", "Blog.t.example.org")
    assert (status, "ordering without it" in said) == (os.EX_OK, True)
    assert lines == [
        f"ok       the account at {authority.directory} is usable",
        "ok       the authority accepted the order",
        "ok       the answer to tls-alpn-01 for blog.t.example.org is in place",
        "ok       the authority has validated all names",
        "ok       the authority issued a certificate, which is thrown away",
    ]
    assert not (tmp_path / "state/certificates").exists()
    status, lines, _ = await certificate(config, "renew", "shop.example.com")
    assert (status, lines) == (os.EX_OK, ["renewed the certificate for shop.example.com"])
    status, lines, _ = await certificate(config, "list", "--json")
    (listed,) = map(json.loads, lines)
    assert (listed["names"], listed["source"]) == ("shop.example.com", "acme")
    assert listed["expires"] > listed["renews"] > 0


async def test_http_01_without_a_relay(authority: Authority, tmp_path: Path) -> None:
    config = stopped_relay(tmp_path, authority)
    config.write_text("\n".join(line for line in config.read_text().splitlines() if not line.startswith("https = ")))
    status, lines, _ = await certificate(config, "try", "blog.t.example.org")
    assert status == os.EX_OK
    assert "ok       the answer to http-01 for blog.t.example.org is in place" in lines


async def test_what_fails_is_shown(authority: Authority, tmp_path: Path) -> None:
    config = stopped_relay(tmp_path, authority)
    status, lines, _ = await certificate(config, "try", "*.t.example.org")
    assert status == os.EX_TEMPFAIL
    assert lines[-1].startswith("failed   could not prove t.example.org: the authority offers dns-01")
    status, lines, said = await certificate(config, "renew", "*.t.example.org")
    assert (status, lines) == (os.EX_TEMPFAIL, [])
    assert "a wildcard needs acme.dns_hook or acme.rfc2136" in said
    status, _, said = await certificate(config, "try", "blog")
    assert (status, "no whole host name" in said) == (os.EX_USAGE, True)
    config.write_text(f'[control]\nport = {lasting_port()}\n[tunnels]\nports = "0"\n')
    status, _, said = await certificate(config, "try", "blog.t.example.org")
    assert (status, "set acme.enabled and acme.agree" in said) == (os.EX_USAGE, True)
    command = [sys.executable, "-m", "tunneld", "--check", "certificate", "list"]
    done = await trio.run_process(command, capture_stderr=True, check=False)
    assert (done.returncode, b"only --config" in done.stderr) == (os.EX_USAGE, True)


async def shown_names(port: int, name: str, roots: ssl.SSLContext) -> list[str]:
    """The names in the certificate that a client of a name verified."""
    stream = trio.SSLStream(await trio.open_tcp_stream("127.0.0.1", port), roots, server_hostname=name)
    with trio.fail_after(PATIENCE):
        await stream.do_handshake()
        shown = stream.getpeercert() or {}
        await trio.aclose_forcefully(stream)
    return [str(each[1]) for each in shown["subjectAltName"]]


async def test_a_tunnel_with_a_host_name_has_a_certificate_within_seconds(authority: Authority, tmp_path: Path) -> None:
    roots = await trio.to_thread.run_sync(authority.issuing_roots)
    async with daemon(tmp_path, words=words(authority), control=lasting_port()) as relay:
        uri = (await relay.ask("openTunnel webmux host=blog")).splitlines()[1].removeprefix("OK ")
        assert f"OK https://blog.t.example.org:{authority.tls_port}/" in await relay.ask(f"getTunnelAddress {uri}")
        await relay.wait_logged("certificate stored")
        assert await shown_names(authority.tls_port, "blog.t.example.org", roots) == ["blog.t.example.org"]
        config = tmp_path / "tunnel.toml"
        status, lines, said = await certificate(config, "list", "--json")
        assert (status, said) == (os.EX_OK, "")
        (listed,) = map(json.loads, lines)
        assert (listed["names"], listed["source"], listed.get("failure")) == ("blog.t.example.org", "acme", None)
        status, lines, _ = await certificate(config, "try", "shop.example.com")  # by the ports of the relay
        assert (status, lines[-1]) == (os.EX_OK, "ok       the authority issued a certificate, which is thrown away")
        status, lines, _ = await certificate(config, "renew", "blog.t.example.org")
        assert (status, lines) == (os.EX_OK, ["renewed the certificate for blog.t.example.org"])
        status, _, said = await certificate(config, "renew", "unknown.example.com")
        assert (status, "no open tunnel has the host name" in said) == (os.EX_USAGE, True)
    async with daemon(tmp_path, words=words(authority)) as relay:
        await relay.ask("openTunnel webmux host=blog")
        assert await shown_names(authority.tls_port, "blog.t.example.org", roots) == ["blog.t.example.org"]
        assert [line for line in relay.log if line["event"] == "certificate ordered"] == []


async def test_a_list_needs_no_credential_where_the_files_can_be_read(authority: Authority, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("a secret of alice")
    secret.chmod(0o600)
    user = f'[[credential]]\nname = "alice"\nsecret_file = "{secret}"\n'
    async with daemon(tmp_path, words=words(authority, user), control=lasting_port()):
        status, lines, said = await certificate(tmp_path / "tunnel.toml", "list")
    assert (status, lines) == (os.EX_OK, [])
    assert "from the files; a credential with the role admin" in said


async def test_the_wildcard_of_a_relay(authority: Authority, tmp_path: Path) -> None:
    roots = await trio.to_thread.run_sync(authority.issuing_roots)
    hook = f"dns_hook = {json.dumps(authority.hook)}\n"
    async with daemon(tmp_path, words=words(authority, hook)) as relay:
        await relay.wait_logged("certificate stored")
        await relay.ask("openTunnel webmux host=blog", "openTunnel webmux host=shop")
        for name in ("blog.t.example.org", "shop.t.example.org"):
            assert await shown_names(authority.tls_port, name, roots) == ["*.t.example.org"]
        assert len([line for line in relay.log if line["event"] == "certificate ordered"]) == 1


async def test_a_failed_order_is_an_event_of_the_tunnel_and_in_the_list(authority: Authority, tmp_path: Path) -> None:
    away = words(authority).replace(authority.directory, "https://localhost:1/dir")
    async with daemon(tmp_path, words=away, control=lasting_port()) as relay, trio.open_nursery() as nursery:
        async with connect(relay.control) as client, client.watch() as events:
            nursery.start_soon(relay.ask, "openTunnel webmux host=blog")
            async for event in events:
                if event["event"] == "certificate":
                    break
        reason = "could not get a certificate for blog.t.example.org: could not reach the authority: ConnectionError"
        assert (event["id"], event["host"], event["reason"]) == ("t1", "blog.t.example.org", reason)
        logged = await relay.wait_logged("no certificate")
        assert (logged["name"], logged["reason"], logged["retry_in"]) == ("blog.t.example.org", reason, 300)
        _, lines, _ = await certificate(tmp_path / "tunnel.toml", "list", "--json")
        (listed,) = map(json.loads, lines)
        assert (listed["names"], listed["failures"], listed["failure"]) == ("blog.t.example.org", 1, reason)
        assert 0 < listed["renews"] <= 300


async def test_a_relay_without_acme_does_not_import_its_libraries(tmp_path: Path) -> None:
    code = (
        "import sys, tunneld.daemon; "
        "print({name.split('.')[0] for name in sys.modules} & {'acme', 'josepy', 'requests', 'OpenSSL', 'dns'})"
    )
    done = await trio.run_process([sys.executable, "-c", code], capture_stdout=True)
    assert done.stdout == b"set()\n"
