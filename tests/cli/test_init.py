"""`tunneld init`: its files are valid, private, replace nothing, and the printed command works on another machine."""

from __future__ import annotations

import os
import re
import shlex
import signal
import ssl
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import trio

from tests.support.peers import PATIENCE, connect, read_exactly
from tests.support.programs import Daemon, program, tunnel_command
from tunneld.cli.tunneld import PORTS, main
from tunneld.config import Settings, load
from tunneld.net.endpoint import CONTROL_PORT, Endpoint
from tunneld.tls.contexts import client_tls_context
from tunneld.tls.pins import fingerprint
from tunneld.tls.self_signed import make_self_signed
from tunneld.wire.verifier import matches

KEPT = {key: value for key, value in os.environ.items() if not key.startswith("TUNNEL")}
FILES = {"tunnel.toml", "relay.pem", "relay.key", "ssh_host_key"}
Captured = pytest.CaptureFixture[str]


class Line:
    """The printed command for the agent, split as a shell splits it."""

    def __init__(self, text: str) -> None:
        (line,) = text.splitlines()
        first, *self.words = shlex.split(line)
        name, _, self.secret = first.partition("=")
        assert (name, self.words[:3]) == ("TUNNEL_SECRET", ["tunnel", "expose", "8000"])
        self.host = self.words.pop(4) if self.words[3] == "--host" else ""
        del self.words[3 : 4 if self.host else 3]
        self.relay, self.credential, self.pin = self.words[4::2]
        assert self.words[3::2] == ["--relay", "--credential", "--pin"]


def made(folder: Path, capsys: Captured, *arguments: str, host: str = "127.0.0.1") -> Line:
    assert main(["init", "--output", str(folder), "--host", host, *arguments]) == 0
    return Line(capsys.readouterr().out)


def test_it_writes_a_working_configuration_for_a_public_relay(tmp_path: Path, capsys: Captured) -> None:
    line = made(tmp_path / "new" / "folder", capsys, "--ports", "30000-30099", host="relay.example.org")
    folder = tmp_path / "new" / "folder"
    assert {path.name for path in folder.iterdir()} == FILES
    assert main(["--check", "--config", str(folder / "tunnel.toml")]) == 0
    settings = load(folder / "tunnel.toml")
    assert (settings.control.host, settings.tunnels.host, settings.http.host) == ("", "", "127.0.0.1")
    assert (settings.tunnels.advertised_host, settings.tunnels.ports) == ("relay.example.org", "30000-30099")
    (credential,) = settings.credential
    assert (credential.name, credential.role) == (line.credential, "user")
    assert (credential.grant.max_tunnels, credential.grant.max_total_visitors) == (20, 2000)
    assert credential.proof is not None
    assert matches(credential.proof, line.secret)
    assert line.relay == f"tls://relay.example.org:{CONTROL_PORT}"
    assert line.pin == fingerprint(ssl.PEM_cert_to_DER_cert((folder / "relay.pem").read_text()))


def test_with_a_domain_tunnels_have_host_names(tmp_path: Path, capsys: Captured) -> None:
    assert main(["init", "--output", str(tmp_path), "--domain", "T.example.org."]) == 0
    captured = capsys.readouterr()
    line = Line(captured.out)
    assert (line.host, line.relay) == ("blog", f"tls://t.example.org:{CONTROL_PORT}")
    for said in ("open ports 80, 443, 7010,", "*.t.example.org.\n", "-R blog:80:localhost:8000 t.example.org\n"):
        assert said in captured.err
    settings = load(tmp_path / "tunnel.toml")
    assert (settings.names.domain, settings.names.http, settings.names.https) == ("t.example.org", ":80", ":443")
    assert settings.tunnels.advertised_host == "t.example.org"
    assert not settings.acme.enabled
    assert "uncomment\n   [acme] in the configuration" in captured.err
    assert main(["--check", "--config", str(tmp_path / "tunnel.toml")]) == 0


def test_certificates_need_an_agreement(tmp_path: Path, capsys: Captured) -> None:
    pytest.importorskip("acme")
    assert main(["init", "--output", str(tmp_path), "--domain", "t.example.org", "--agree"]) == 0
    assert "uncomment" not in capsys.readouterr().err
    acme = load(tmp_path / "tunnel.toml").acme
    assert (acme.enabled, acme.agree, acme.contact) == (True, True, "")


def test_the_commented_tables_obtain_certificates(tmp_path: Path, capsys: Captured) -> None:
    pytest.importorskip("acme")
    made(tmp_path, capsys, "--domain", "t.example.org")
    path = tmp_path / "tunnel.toml"
    path.write_text(re.sub(r"^#(?=\[acme|enabled|agree|contact)", "", path.read_text(), flags=re.MULTILINE))
    acme = load(path).acme
    assert (acme.enabled, acme.agree, acme.contact) == (True, True, "ops@example.org")


def test_a_relay_can_have_another_name_than_its_domain(tmp_path: Path, capsys: Captured) -> None:
    line = made(tmp_path, capsys, "--domain", "t.example.org", host="relay.example.org")
    assert line.relay == f"tls://relay.example.org:{CONTROL_PORT}"
    assert load(tmp_path / "tunnel.toml").names.domain == "t.example.org"


def test_the_secret_is_in_no_file_and_only_the_user_can_read_the_files(tmp_path: Path, capsys: Captured) -> None:
    before = os.umask(0)
    try:
        line = made(tmp_path, capsys)
    finally:
        os.umask(before)
    for path in tmp_path.iterdir():
        assert line.secret not in path.read_text()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_services_have_the_given_ports(tmp_path: Path, capsys: Captured) -> None:
    ports = ("--control-port", "9010", "--http-port", "9011", "--webmux-port", "9012", "--ssh-port", "9022")
    assert made(tmp_path, capsys, *ports).relay == "tls://127.0.0.1:9010"
    settings = load(tmp_path / "tunnel.toml")
    found = (settings.control.port, settings.http.port, settings.webmux.port, settings.ssh.port)
    assert found == (9010, 9011, 9012, 9022)
    assert main(["init", "--output", str(tmp_path / "b"), "--host", "127.0.0.1", "--control-port", "20000"]) == 64
    assert "contains port 20000, which the relay needs for itself" in capsys.readouterr().err


def test_the_group_of_a_setgid_folder_can_read_the_files(tmp_path: Path, capsys: Captured) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o2750)
    made(folder, capsys)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o640}
    assert main(["--check", "--config", str(folder / "tunnel.toml")]) == 0


def test_the_instructions_use_the_unit_where_it_reads_the_configuration(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start_command(config: Path) -> str:
        assert main(["init", "--host", "relay.example.org", "--force", "--output", str(config)]) == 0
        return next(line for line in capsys.readouterr().err.splitlines() if line.startswith("    ")).strip()

    monkeypatch.setattr("tunneld.cli.init.UNIT_FOLDERS", (tmp_path,))
    monkeypatch.setattr("tunneld.cli.init.UNIT_CONFIG", tmp_path / "tunnel.toml")
    assert start_command(tmp_path / "tunnel.toml").startswith("tunneld --config")
    (tmp_path / "tunneld.service").touch()
    assert start_command(tmp_path / "tunnel.toml") == "systemctl enable --now tunneld"
    assert start_command(tmp_path / "other.toml").startswith("tunneld --config")


def test_existing_files_are_replaced_only_with_force(tmp_path: Path, capsys: Captured) -> None:
    made(tmp_path, capsys)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    arguments = ["init", "--output", str(tmp_path), "--host", "127.0.0.1"]
    assert main(arguments) == os.EX_USAGE
    assert "exist already; use another --output, or --force to replace them" in capsys.readouterr().err
    (tmp_path / "tunnel.toml").unlink()
    assert main(arguments) == os.EX_USAGE
    assert {path.name for path in tmp_path.iterdir()} == FILES - {"tunnel.toml"}
    capsys.readouterr()
    made(tmp_path, capsys, "--force")
    assert all(path.read_bytes() != content for path, content in before.items())
    assert {path.name for path in tmp_path.iterdir()} == FILES


def test_a_folder_that_cannot_be_written_is_reported(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "file").touch()
    assert main(["init", "--output", str(tmp_path / "file"), "--host", "h"]) == os.EX_CONFIG
    assert capsys.readouterr().err.endswith("could not write the file: file exists\n")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["init", "--host", "::"], "stands for all addresses"),
        (["init", "--host", "a b"], "invalid host name or address"),
        (["init", "--host", "h", "--agree"], "it requires --domain"),
        (["init", "--domain", "localhost"], "--domain localhost is not a domain, such as t.example.org"),
        (["init", "--domain", "*.example.org"], "is not a domain"),
        (["init", "--domain", "192.0.2.1"], "invalid host name"),
        (["init", "--host", "h", "--ports", "9-1"], "9 is greater than 1"),
        (["init", "--host", "h", "--ports", "7000-7011"], "--ports 7000-7011 contains port 7010"),
        (["--config", "x.toml", "init", "--host", "h"], "use --output to say where to write"),
    ],
)
def test_an_invalid_option_writes_nothing(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch, arguments: list[str], says: str
) -> None:
    monkeypatch.setenv("TUNNELD_CONFIG", str(tmp_path / "tunnel.toml"))
    assert main(arguments) == os.EX_USAGE
    assert says in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_without_output_it_writes_the_file_that_tunneld_reads(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNNELD_CONFIG", str(tmp_path / "my.toml"))
    assert main(["init", "--host", "::1"]) == 0
    assert Line(capsys.readouterr().out).relay == f"tls://[::1]:{CONTROL_PORT}"
    assert main(["--check"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'my.toml'}: ok\n"


def test_the_default_ports_are_those_of_the_schema() -> None:
    assert Settings().tunnels.ports == PORTS
    assert Settings().control.port == CONTROL_PORT


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "relay.example.org", f"{'a.' * 60}example.org"])
def test_the_certificate_works_as_its_own_ca(tmp_path: Path, host: str) -> None:
    certificate = make_self_signed(host)
    for name, content in (("relay.pem", certificate.certificate), ("relay.key", certificate.key)):
        (tmp_path / name).write_bytes(content)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(tmp_path / "relay.pem", tmp_path / "relay.key")
    tls = client_tls_context(tmp_path / "relay.pem", pin=certificate.pin)
    tls.verify_flags |= ssl.VERIFY_X509_STRICT
    shake_hands(tls, host, server)


def shake_hands(tls: ssl.SSLContext, host: str, server: ssl.SSLContext) -> None:
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [tls.wrap_bio(down, up, server_hostname=host), server.wrap_bio(up, down, server_side=True)]
    while ends:
        for end in list(ends):
            try:
                end.do_handshake()
                ends.remove(end)
            except ssl.SSLWantReadError:
                continue


# End to end


@asynccontextmanager
async def relay_of(config: Path) -> AsyncIterator[Daemon]:
    """Run `tunneld` with this file and a JSON log; it is ready when the block begins."""
    command = [sys.executable, "-m", "tunneld", "--config", str(config), "--log-format", "json"]
    async with program(command, stderr=subprocess.PIPE) as process, trio.open_nursery() as nursery:
        running = Daemon(process)
        nursery.start_soon(running.listen)
        running.control = (await running.wait_logged("control listens"))["uri"]
        await running.wait_logged("ready")
        yield running
        nursery.cancel_scope.cancel()


def test_the_commented_lines_open_the_http_interface(tmp_path: Path, capsys: Captured) -> None:
    made(tmp_path, capsys, host="relay.example.org")
    path = tmp_path / "tunnel.toml"
    before, _, web = path.read_text().partition("[http]")
    web, rest = web.split("[tunnels]")
    for was, now in (("127.0.0.1", ""), ("#allowed", "allowed"), ("#tls", "tls")):
        web = web.replace(was, now)
    path.write_text(f"{before}[http]{web}[tunnels]{rest}")
    http = load(path).http
    assert (http.host, http.allowed_hosts) == ("", ("relay.example.org",))
    assert http.tls is not None


def on_any_port(config: Path) -> None:
    """Replace all ports in the file by 0, since they may be in use."""
    text = config.read_text().replace(f"port = {CONTROL_PORT}", "port = 0").replace(PORTS, "0")
    text = text.replace("[http]", "[http]\nport = 0").replace("[ssh]", "[ssh]\nport = 0")
    config.write_text(text.replace("[control.tls]", "[webmux]\nport = 0\n[control.tls]"))


async def refused(words: list[str], secret: str) -> tuple[int, str]:
    done = await trio.run_process(
        words, env=KEPT | {"TUNNEL_SECRET": secret}, check=False, capture_stdout=True, capture_stderr=True
    )
    assert done.stdout == b""
    assert done.stderr.count(b"\n") == 1
    return done.returncode, done.stderr.decode()


async def hello(stream: trio.SocketStream) -> None:
    async with stream:
        with suppress(trio.BrokenResourceError):
            await stream.send_all(b"hello")


async def test_the_printed_command_works_and_a_wrong_pin_or_secret_does_not(tmp_path: Path, capsys: Captured) -> None:
    line = made(tmp_path, capsys)
    on_any_port(tmp_path / "tunnel.toml")
    with trio.fail_after(PATIENCE):
        async with relay_of(tmp_path / "tunnel.toml") as relay, trio.open_nursery() as nursery:
            (local,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
            nursery.start_soon(trio.serve_listeners, hello, [local])
            target, where = str(local.socket.getsockname()[1]), f"tls://127.0.0.1:{relay.control_port}"

            def words(verb: str, *arguments: str, pin: str = line.pin) -> list[str]:
                known = ["--credential", line.credential, "--pin", pin] if pin else ["--insecure"]
                return tunnel_command(verb, *arguments, "--relay", where, *known)

            command = words("expose", target)
            async with program(
                command, env=KEPT | {"TUNNEL_SECRET": line.secret}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            ) as agent:
                assert agent.stdout is not None
                printed = b""
                while not printed.endswith(b"\n"):
                    printed += await agent.stdout.receive_some(1)
                address = Endpoint.parse(printed.decode().strip())
                assert address.host == "127.0.0.1"
                async with await connect(address) as visitor:
                    assert await read_exactly(visitor, 5) == b"hello"
                agent.send_signal(signal.SIGTERM)
                assert await agent.wait() == 0
            await relay.wait_logged("tunnel closed")  # asked for over another connection, as one after a loss is
            wrong_pin = await refused(words("expose", target, pin="sha256:" + "0" * 64), line.secret)
            assert (wrong_pin[0], line.pin in wrong_pin[1]) == (76, True)
            wrong_secret = await refused(words("expose", target), line.secret[::-1])
            assert (wrong_secret[0], "refused the credential" in wrong_secret[1]) == (77, True)
            for verb in ("shutdown", "reload"):
                assert (await refused(words(verb), line.secret))[0] == 77
            nursery.cancel_scope.cancel()
