"""[[credential]]: parsed strictly, shown without secrets, dumped unchanged."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from tests.support.credentials import SECRET, credential
from tunneld.config import Settings, diff, dump, load, make_verifier
from tunneld.config.credentials import MAX_SECRET_BYTES, Credential
from tunneld.config.file import parse
from tunneld.errors import ConfigError, UsageError
from tunneld.net.endpoint import parse_network
from tunneld.policy.access import Grant, Role
from tunneld.wire.verifier import ITERATIONS, Verifier, matches

VERIFIER = (  # of RFC 7677's "pencil"
    "SCRAM-SHA-256$4096:W22ZaJ0SNY7soEsUEjb6gQ==$WG5d8oPm3OtcPnkdi4Uo7BkeZkBFzpcXkuLmtbsT4qY=:"
    "wfPLwcE6nTWhTAmQ7tl2KeoiWGPlZqQxSrmfPwDl2dU="
)
FINGERPRINT = "sha256:" + "0f" * 32
HEAD = f'[[credential]]\nname = "alice"\nverifier = "{VERIFIER}"\n'


def loaded(folder: Path, content: str) -> Settings:
    path = folder / "tunnel.toml"
    path.write_text(content)
    return load(path)


def problems(folder: Path, content: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        loaded(folder, content)
    return [problem.partition(".toml: ")[2] for problem in caught.value.problems]


def test_a_credential_has_a_grant(tmp_path: Path) -> None:
    content = f"""{HEAD}
        role = "admin"
        backends = ["tcp"]
        ports = ["80", "2000-2009"]
        bind = ["192.0.2.80/32"]
        networks = ["192.0.2.7/24"]
        server_from = ["2001:db8::/32"]
        max_tunnels = 1
        max_visitors = 2
        max_ttl = 3
    """
    (alice,) = loaded(tmp_path, content).credential
    assert alice.grant == Grant(
        "alice",
        Role.ADMIN,
        backends=("tcp",),
        ports=(range(80, 81), range(2000, 2010)),
        bind=(parse_network("192.0.2.80/32"),),
        networks=(parse_network("192.0.2.0/24"),),
        server_from=(parse_network("2001:db8::/32"),),
        max_tunnels=1,
        max_visitors=2,
        max_ttl=3.0,
    )


def test_by_default_a_credential_is_a_user_without_limits(tmp_path: Path) -> None:
    (alice,) = loaded(tmp_path, HEAD).credential
    assert alice.grant == Grant("alice")
    assert alice.proof == Verifier.parse(VERIFIER)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("[credential]\nname = 'a'", "credential: a table is not an array"),
        ("credential = [3]", "credential[0]: 3 is not a table"),
        ("[[credential]]", "credential[0].name: missing, and it has no default"),
        (
            "[[credential]]\nname = 'a'",
            'credential[0]: "a" has no verifier, secret_file, secret_env, certificate or authorized_keys',
        ),
        (
            f"{HEAD}secret_env = 'HOME'",
            'credential[0]: "alice" has verifier and secret_env; use only one of them',
        ),
        (
            HEAD.replace("alice", "a b"),
            'credential[0].name: "a b" is not a name of at most 64 letters, digits, dots, dashes and underscores',
        ),
        (HEAD + HEAD, 'credential: the name "alice" occurs 2 times; it must be unique'),
        (f"{HEAD}role = 'root'", 'credential[0].role: "root" is not one of user, viewer, admin'),
        (f"{HEAD}port = ['1']", "credential[0].port: unrecognized key; did you mean ports?"),
        (
            f"{HEAD}ports = ['x']",
            'credential[0].ports[0]: "x" is not a port range; use FIRST-LAST, a single port, or 0',
        ),
        (
            f"{HEAD}ports = ['0']",
            "credential[0].ports[0]: port 0 cannot be requested; omit the key to allow every port",
        ),
        (
            f"{HEAD}backends = []",
            "credential[0].backends: an empty array allows nothing; omit the key to allow everything",
        ),
        (f"{HEAD}backends = ['TCP']", 'credential[0].backends[0]: "TCP" is not a backend'),
        (f"{HEAD}networks = ['x']", 'credential[0].networks[0]: "x" is not an address or a network'),
        (f"{HEAD}max_tunnels = 0", "credential[0].max_tunnels: 0 is not between 1 and 1000000"),
        (f"{HEAD}max_ttl = 0", "credential[0].max_ttl: 0 is not between 0.001 and 31536000"),
        (
            "[[credential]]\nname = 'a'\nsecret_env = 'TUNNELD_TEST_UNSET'",
            "credential[0]: TUNNELD_TEST_UNSET: this environment variable is not set",
        ),
        (
            "[[credential]]\nname = 'a'\ncertificate = 'sha1:00'",
            (
                'credential[0].certificate: "sha1:00" is neither a fingerprint (sha256: and 64 hexadecimal digits) nor '
                "a subject (subject:CN=alice)"
            ),
        ),
        (
            f"[[credential]]\nname = 'a'\ncertificate = '{FINGERPRINT}'",
            (
                'credential: "a" has a certificate, but no client certificate is requested; set control.tls.client_ca '
                "or http.tls.client_ca"
            ),
        ),
    ],
)
def test_each_error_is_one_sentence(tmp_path: Path, content: str, problem: str) -> None:
    assert problems(tmp_path, content) == [problem]


def test_all_errors_are_reported_at_once(tmp_path: Path) -> None:
    found = problems(tmp_path, f"{HEAD}max_ttl = 0\nrole = 'x'\n[[credential]]\nname = ''\n[log]\nlevel = 'x'")
    assert [problem.partition(":")[0] for problem in found] == [
        "log.level",
        "credential[0].role",
        "credential[0].max_ttl",
        "credential[1].name",
    ]


# Secrets


@pytest.mark.parametrize(
    "line",
    [
        'verifier = "my secret word"',
        'verifier = ["my secret word"]',
        'secret = "my secret word"',
        'password = "my secret word"',
        'verifier = "SCRAM-SHA-256$4096:my secret word$x:y"',
    ],
)
def test_a_secret_in_the_wrong_place_is_not_quoted(tmp_path: Path, line: str) -> None:
    assert "secret word" not in " ".join(problems(tmp_path, f"[[credential]]\nname = 'a'\n{line}"))


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_a_secret_in_a_file_is_its_only_line(tmp_path: Path, end: str) -> None:
    (tmp_path / "a.secret").write_text(SECRET + end, newline="")
    (found,) = loaded(tmp_path, "[[credential]]\nname = 'a'\nsecret_file = 'a.secret'").credential
    assert found.proof is not None
    assert matches(found.proof, SECRET)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "at least 8 characters"),
        (b"seven77\n", "at least 8 characters"),
        (b"two lines\nare no secret\n", "printable ASCII"),
        (b"caf\xe9 au lait", "printable ASCII"),
        (b"x" * (MAX_SECRET_BYTES + 1), "larger than 1024 bytes"),
    ],
)
def test_a_file_without_a_secret_is_an_error(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "a.secret").write_bytes(content)
    (problem,) = problems(tmp_path, "[[credential]]\nname = 'a'\nsecret_file = 'a.secret'")
    assert reason in problem
    assert "no secret" not in problem


def test_a_secret_in_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALICE_SECRET", SECRET)
    (found,) = loaded(tmp_path, "[[credential]]\nname = 'a'\nsecret_env = 'ALICE_SECRET'").credential
    assert found.proof is not None
    assert matches(found.proof, SECRET)


def three_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("BOB_SECRET", SECRET)
    (tmp_path / "carol.secret").write_text(SECRET)
    content = f"""{HEAD}
        [[credential]]
        name = "bob"
        secret_env = "BOB_SECRET"
        ports = ["80"]
        [[credential]]
        name = "carol"
        secret_file = "carol.secret"
    """
    return loaded(tmp_path, content)


def test_a_dump_loads_back_and_contains_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = three_credentials(tmp_path, monkeypatch)
    dumped = dump(settings)
    assert parse(dumped.encode(), Path("/nowhere")) == settings
    assert SECRET not in dumped
    assert dumped.count("SCRAM-SHA-256$") == 1  # that of alice, which is in the file; none was made for the rest


def test_settings_and_changes_show_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = three_credentials(tmp_path, monkeypatch)
    shown = f"{settings} {settings!r} {[str(change) for change in diff(Settings(), settings)]}"
    assert SECRET not in shown
    assert not re.search(r"SCRAM-SHA-256\$\d", shown)
    assert "WG5d8oPm3" not in shown


def test_a_new_verifier_is_another_one_each_time_and_fits() -> None:
    one, two = make_verifier(SECRET), make_verifier(SECRET)
    assert one != two
    assert matches(Verifier.parse(one), SECRET)
    assert Verifier.parse(one).iterations == ITERATIONS
    with pytest.raises(UsageError, match="at least 8"):
        make_verifier("short")


def test_a_fingerprint_is_accepted_as_openssl_prints_it() -> None:
    dumped = "SHA256:" + ":".join(["0F"] * 32)
    assert Credential(name="a", certificate=dumped).certificate == FINGERPRINT


def test_a_subject_is_normalised() -> None:
    for text in ("subject:CN=alice,O=Example", "subject:CN=al\\69ce,O=Example"):
        assert Credential(name="a", certificate=text).certificate == "subject:CN=alice,O=Example"


@pytest.mark.parametrize("text", ["subject:", "subject:alice", "subject:CN=alice,"])
def test_a_malformed_subject_is_refused(text: str) -> None:
    with pytest.raises(ValidationError, match="subject:CN=alice"):
        Credential(name="a", certificate=text)


# Reload


def test_a_change_names_the_credential(tmp_path: Path) -> None:
    old = Settings(credential=(credential("alice"), credential("bob")))
    new = Settings(credential=(credential("alice", role="admin", max_tunnels=3), credential("carol")))
    assert [str(change) for change in diff(old, new)] == [
        'credential.alice.role: "user" -> "admin"',
        "credential.alice.max_tunnels: nothing -> 3",
        'credential.bob: "user" -> nothing',
        'credential.carol: nothing -> "user"',
    ]


def test_a_changed_verifier_is_masked() -> None:
    old, new = Settings(credential=(credential("alice"),)), Settings(credential=(credential("alice", "another one"),))
    assert [str(change) for change in diff(old, new)] == [
        "credential.alice.verifier: SCRAM-SHA-256$... -> SCRAM-SHA-256$..."
    ]


def test_a_changed_secret_file_is_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = three_credentials(tmp_path, monkeypatch)
    (tmp_path / "carol.secret").write_text("another secret")
    changes = diff(old, load(tmp_path / "tunnel.toml"))
    assert [str(change) for change in changes] == ['credential.carol.secret: "old" -> "new"']


# Ports that are open to anyone


PUBLIC = '[control]\nhost = ""\n'
TLS = 'tls = { certificate = "relay.pem", key = "relay.key" }\n'


def test_credentials_with_tls_allow_a_public_address(certificates: Path) -> None:
    assert loaded(certificates, PUBLIC + TLS + HEAD).control.host == ""


@pytest.mark.parametrize(
    ("content", "advice"),
    [
        (PUBLIC + HEAD, "has credentials and no [control.tls]"),
        (PUBLIC + TLS, "add a [[credential]] and [control.tls]"),
        (PUBLIC + TLS + "[[credential]]\n", "name: missing"),
        (f"credential = []\n{PUBLIC}{TLS}", "lets anyone open tunnels"),
    ],
)
def test_credentials_or_tls_alone_do_not_allow_it(certificates: Path, content: str, advice: str) -> None:
    assert any(advice in problem for problem in problems(certificates, content))


def test_credentials_with_tls_allow_a_public_http_address(certificates: Path) -> None:
    assert loaded(certificates, f'[http]\nhost = ""\n{TLS}{HEAD}').http.host == ""


def test_a_client_ca_allows_a_public_http_address(certificates: Path) -> None:
    mutual = TLS.replace(" }", ', client_ca = "relay.pem" }')
    assert loaded(certificates, f'[http]\nhost = ""\n{mutual}').http.tls is not None


@pytest.mark.parametrize("tls", ["", TLS])
def test_credentials_or_tls_alone_do_not_allow_a_public_http_address(certificates: Path, tls: str) -> None:
    content = f'[http]\nhost = ""\n{tls}' + (HEAD if not tls else "")
    (problem,) = problems(certificates, content)
    assert problem.startswith("http.open_to_anyone: is false")
    assert "add a [[credential]] and [http.tls]" in problem


def test_credentials_alone_do_not_allow_a_public_http_address(certificates: Path) -> None:
    (problem,) = problems(certificates, f'[http]\nhost = ""\n{HEAD}')
    assert problem.startswith("http.open_to_anyone: is false")
