"""`tunnel identity`, `tunnel trust` and `tunnel invite`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunneld.cli.tunnel import main
from tunneld.net.node_id import NodeId
from tunneld.tls.identity import Identity

BOB = str(Identity.from_seed(b"b" * 32).id)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "tunneld"


def test_an_identity_is_created_once(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["identity"]) == 64
    assert "tunnel identity create" in capsys.readouterr().err
    assert main(["identity", "create"]) == 0
    made = capsys.readouterr()
    assert str(NodeId.parse(made.out.strip())) == made.out.strip()
    assert "back it up" in made.err
    assert (home / "identity.pem").stat().st_mode & 0o777 == 0o600
    for words in (["identity"], ["identity", "show"]):
        assert main(words) == 0
        assert capsys.readouterr().out == made.out
    assert main(["identity", "create"]) == 64
    assert "already" in capsys.readouterr().err


def test_an_identity_elsewhere(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["identity", "create", "--identity", str(tmp_path / "other.pem")]) == 0
    assert str(Identity.load(tmp_path / "other.pem").id) in capsys.readouterr().out
    assert not home.exists()


def test_peers_are_added_listed_and_removed(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trust", "add", "bob", BOB]) == 0
    assert main(["trust", "list"]) == 0
    assert capsys.readouterr().out == f"bob\t{BOB}\n"
    assert main(["trust", "add", "bob", "AAAAAAAAAAAAAAAAAAAAAAAAAAA"]) == 64
    assert "is " + BOB in capsys.readouterr().err
    assert main(["trust", "add", "carol", "nonsense"]) == 64
    assert main(["trust", "remove", "bob"]) == 0
    assert main(["trust", "remove", "bob"]) == 64
    assert main(["trust", "list"]) == 0
    assert capsys.readouterr().out == ""


def test_an_invitation_needs_an_identity_and_a_relay(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--relay", "127.0.0.1:1", "--timeout", "1"]
    assert main(["invite", "shell", *where]) == 64
    assert main(["identity", "create"]) == 0
    capsys.readouterr()
    assert main(["invite", "shell", "--for", "5m", *where]) == 69
    assert capsys.readouterr().out == ""
    assert not (home.parent / "state").exists()


def test_ids_do_not_look_like_options() -> None:
    assert not any(str(Identity.create().id).startswith("-") for _ in range(200))
