"""How `tunnel` authenticates and verifies the relay: options, environment, files, exit statuses."""

from __future__ import annotations

import argparse
import getpass
import os
import ssl
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import trio
import trustme

from tests.cli.test_tunnel import tunnel
from tests.support.control import running_server
from tests.support.credentials import SECRET, authenticator_of, credential
from tests.support.peers import PATIENCE
from tunneld.cli import access as access_module
from tunneld.cli.access import access
from tunneld.cli.tunnel import parser
from tunneld.config.certificates import TlsFiles
from tunneld.errors import UsageError
from tunneld.tls import contexts
from tunneld.tls.pins import fingerprint

ALICE = credential("alice")
NO_PIN = "sha256:" + "0" * 64


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CREDENTIAL", "SECRET", "SECRET_FILE", "PIN", "RELAY", "CA", "CERT", "KEY"):
        monkeypatch.delenv(f"TUNNEL_{name}", raising=False)


@pytest.fixture
def secret_file(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_text(SECRET + "\n")
    path.chmod(0o600)
    return path


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[TlsFiles, str]:
    """A self-signed certificate of a relay, and its fingerprint."""
    folder = tmp_path_factory.mktemp("certificate")
    issued = trustme.CA().issue_cert("127.0.0.1")
    issued.private_key_pem.write_to_path(folder / "key")
    issued.cert_chain_pems[0].write_to_path(folder / "pem")
    der = ssl.PEM_cert_to_DER_cert((folder / "pem").read_text())
    return TlsFiles(certificate=folder / "pem", key=folder / "key"), fingerprint(der)


def parsed(*arguments: str) -> argparse.Namespace:
    return parser().parse_args(["list", *arguments])


# Secrets


async def test_only_a_credential_with_its_secret_file_is_accepted(secret_file: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_text("something else\n")
    wrong.chmod(0o600)
    async with running_server(authenticator=authenticator_of(ALICE)) as server:
        relay = server.endpoint.authority
        known = await tunnel("list", "--credential", "alice", "--secret-file", str(secret_file), relay=relay)
        assert (known.returncode, known.stdout.count(b"\n")) == (0, 2)
        for arguments, says in (
            (["--credential", "alice", "--secret-file", str(wrong)], "refused the credential 'alice'"),
            (["--credential", "bob", "--secret-file", str(secret_file)], "refused the credential 'bob'"),
            ([], "requires authentication"),
        ):
            done = await tunnel("list", *arguments, relay=relay)
            assert (done.returncode, done.stdout, done.stderr.count(b"\n")) == (77, b"", 1)
            assert says in done.stderr.decode()
            assert SECRET not in done.stderr.decode()


async def test_a_wrong_secret_ends_expose_at_once(secret_file: Path) -> None:
    """The secret belongs to another credential."""
    async with running_server(authenticator=authenticator_of(ALICE, credential("bob", "another secret"))) as server:
        arguments = ("--credential", "bob", "--secret-file", str(secret_file))
        done = await tunnel("expose", str(server.endpoint.port), *arguments, relay=server.endpoint.authority)
        assert (done.returncode, done.stdout, done.stderr.count(b"\n")) == (77, b"", 1)


def test_options_take_precedence_over_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    paths = {}
    for name in ("typed", "set"):
        paths[name] = str(tmp_path / name)
        Path(paths[name]).write_text(f"{name} in a file")
        Path(paths[name]).chmod(0o640)
    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr(getpass, "getpass", lambda prompt: f"answer to {prompt}")
    monkeypatch.setenv("TUNNEL_CREDENTIAL", "alice")
    assert access_module.credential(parsed()) == ("alice", "answer to secret of alice: ")
    monkeypatch.setenv("TUNNEL_SECRET_FILE", paths["set"])
    assert access_module.credential(parsed()) == ("alice", "set in a file")
    monkeypatch.setenv("TUNNEL_SECRET", "the variable")
    assert access_module.credential(parsed("--credential", "bob")) == ("bob", "the variable")
    assert access_module.credential(parsed("--secret-file", paths["typed"])) == ("alice", "typed in a file")


class Terminal:
    def isatty(self) -> bool:
        return True


def test_a_secret_file_requires_a_credential(monkeypatch: pytest.MonkeyPatch, secret_file: Path) -> None:
    monkeypatch.setenv("TUNNEL_SECRET", SECRET)
    assert access(parsed()).credential is None
    with pytest.raises(UsageError, match="is of no use without --credential"):
        access(parsed("--secret-file", str(secret_file)))


def test_without_a_terminal_the_error_names_the_other_sources_of_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UsageError, match="no secret for the credential 'alice': use --secret-file FILE or "):
        access_module.credential(parsed("--credential", "alice"))


@pytest.mark.parametrize("content", [b"", b"\n", b"two\nlines\n", b"x" * 1025])
def test_an_invalid_secret_file_is_refused_and_its_content_not_printed(secret_file: Path, content: bytes) -> None:
    secret_file.write_bytes(content)
    with pytest.raises(UsageError, match="must have exactly one line, of at most 1024 bytes") as caught:
        access_module.from_file(str(secret_file))
    assert "two" not in str(caught.value)


def test_a_file_that_every_user_can_read_is_refused(secret_file: Path) -> None:
    secret_file.chmod(0o644)
    with pytest.raises(UsageError, match=r"every user of this machine can read .*chmod o-rwx"):
        access_module.from_file(str(secret_file))
    with pytest.raises(UsageError, match="no such file or directory"):
        access_module.from_file(f"{secret_file}.nowhere")


@pytest.mark.parametrize("owner", ["another user", "a read-only file system"])
def test_a_file_that_every_user_can_read_is_used_if_its_mode_cannot_be_changed(
    secret_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], owner: str
) -> None:
    """Secrets of containers: files of root with mode 0444, often on a read-only file system."""
    secret_file.chmod(0o444)
    if owner == "another user":
        monkeypatch.setattr(os, "geteuid", lambda: secret_file.stat().st_uid + 1)
    else:
        monkeypatch.setattr(os, "fstatvfs", lambda _fd: SimpleNamespace(f_flag=os.ST_RDONLY))
    assert access(parsed("--credential", "alice", "--secret-file", str(secret_file))).credential == ("alice", SECRET)
    warning = f"tunnel: warning: every user of this machine can read the secret file {secret_file}\n"
    assert capsys.readouterr().err == warning
    assert access_module.from_file(str(secret_file)) == SECRET
    assert capsys.readouterr().err == ""  # not at each look for a new secret


@pytest.mark.parametrize("content", ["{}\n", "{}\r\n", "{}", "\ufeff{}\n"])
def test_a_line_end_and_a_byte_order_mark_are_no_part_of_the_secret(secret_file: Path, content: str) -> None:
    secret_file.write_bytes(content.format(SECRET).encode())
    assert access_module.from_file(str(secret_file)) == SECRET


def test_only_one_line_end_is_removed(secret_file: Path) -> None:
    secret_file.write_text(f"{SECRET} \n")
    assert access_module.from_file(str(secret_file)) == f"{SECRET} "


def test_the_user_is_told_which_of_two_secrets_is_used(
    secret_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TUNNEL_CREDENTIAL", "alice")
    monkeypatch.setenv("TUNNEL_SECRET", "one")
    assert access(parsed()).secret_source == "$TUNNEL_SECRET"
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("TUNNEL_SECRET_FILE", "/nowhere")
    assert access(parsed()).credential == ("alice", "one")
    assert capsys.readouterr().err == (
        "tunnel: the secret of 'alice' is taken from $TUNNEL_SECRET, not from $TUNNEL_SECRET_FILE (/nowhere)\n"
    )
    made = access(parsed("--secret-file", str(secret_file)))
    assert (made.credential, made.secret_source) == (("alice", SECRET), f"--secret-file {secret_file}")
    assert capsys.readouterr().err == (
        f"tunnel: the secret of 'alice' is taken from --secret-file {secret_file}, not from $TUNNEL_SECRET or "
        "$TUNNEL_SECRET_FILE (/nowhere)\n"
    )


async def test_a_refused_credential_names_the_source_of_its_secret(secret_file: Path) -> None:
    secret_file.write_text("something else")  # noqa: ASYNC240 - a few bytes
    arguments = ("--credential", "alice", "--secret-file", str(secret_file))
    async with running_server(authenticator=authenticator_of(ALICE)) as server:
        done = await tunnel("list", *arguments, relay=server.endpoint.authority)
    advice = f"check the name and the secret, which is from --secret-file {secret_file}\n"
    assert done.stderr.decode().endswith(advice)


def test_no_option_takes_the_secret_itself_and_access_does_not_print_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNNEL_SECRET", SECRET)
    assert SECRET not in repr(access(parsed("--credential", "alice")))
    with pytest.raises(SystemExit):
        parsed("--secret", SECRET)


# Pins


async def test_a_relay_is_verified_by_its_pin(certificate: tuple[TlsFiles, str]) -> None:
    settings, pin = certificate
    with trio.fail_after(PATIENCE):
        async with running_server(tls=contexts.server_tls_context(settings)) as server:
            plain, tls = server.endpoint.authority, str(server.endpoint)
            for relay in (plain, tls):
                assert (await tunnel("list", "--pin", pin, relay=relay)).returncode == 0
            for verb in (["list"], ["expose", str(server.endpoint.port)]):
                wrong = await tunnel(*verb, "--pin", NO_PIN, relay=tls)
                assert (wrong.returncode, wrong.stderr.count(b"\n")) == (76, 1)
                assert pin in wrong.stderr.decode()
                assert NO_PIN in wrong.stderr.decode()
            unknown = await tunnel("list", relay=tls)
            hint = b"pass --pin (printed by `tunneld init`) or --ca FILE"
            assert (unknown.returncode, hint in unknown.stderr) == (69, True)
            anybody = await tunnel("list", "--insecure", relay=tls)
            assert (anybody.returncode, b"warning: --insecure" in anybody.stderr) == (0, True)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--relay", "tcp://h:1", "--pin", NO_PIN], "does not use TLS; --pin requires tls://"),
        (["--relay", "tcp://h:1", "--insecure"], "--insecure requires tls://"),
        (["--insecure", "--pin", NO_PIN], "cannot be combined with --pin"),
        (["--insecure", "--ca", "ca.pem"], "cannot be combined with --ca"),
    ],
)
def test_options_that_contradict_each_other(arguments: list[str], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        access(parsed(*arguments))


def test_the_pin_comes_from_the_environment_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNNEL_PIN", NO_PIN.upper())
    assert parsed().pin == NO_PIN
    monkeypatch.setenv("TUNNEL_PIN", "sha256:0")
    with pytest.raises(SystemExit) as ended:
        parsed()
    assert ended.value.code == 64
